"""timm models as backbones (optional extra ``timm``): pooled features, any input size where the family allows it."""

from torch import nn


def timm_model(name: str, img_size: int | tuple[int, int], in_chans: int, drop_path_rate: float) -> nn.Module:
    """An untrained timm model that maps images (B, in_chans, H, W) to features (B, D); no weights are fetched.

    Vision transformers get ``dynamic_img_size``, so that global and local crops both pass.

    Raises:
        ModuleNotFoundError: without timm, saying how to install it.
        ValueError: for a name that timm does not have.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"backbone 'timm/{name}' needs timm: pip install timm", name="timm") from error
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ValueError(f"timm has no model {name!r}; similar names: {', '.join(similar) or 'none'}")
    options = {"img_size": img_size, "dynamic_img_size": True, "drop_path_rate": drop_path_rate}
    while True:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **options)
        except TypeError as error:
            # Not every family knows every option, and timm says so only by refusing it.
            refused = next((option for option in options if f"'{option}'" in str(error)), None)
            if refused is None:
                raise
            del options[refused]
