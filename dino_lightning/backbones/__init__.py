"""Backbones: modules that map images (B, C, H, W) to features (B, D), by name or as given."""

import copy
import logging

import torch
from torch import nn

from dino_lightning.backbones.cnn import cnn_names, torchvision_cnn
from dino_lightning.backbones.timm import timm_model
from dino_lightning.backbones.vit import VIT_SIZES, VisionTransformer

__all__ = ["VisionTransformer", "build", "example_images", "feature_dim", "features_at", "freeze_unused", "redrawn"]

log = logging.getLogger(__name__)

_DINOV2 = {f"dinov2_{short}14": size for short, size in zip(("vits", "vitb", "vitl", "vitg"), list(VIT_SIZES)[1:])}


def build(
    name: str,
    *,
    patch_size: int = 16,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """An untrained backbone by name: a ViT of ``VIT_SIZES``, a torchvision CNN, or ``timm/NAME``. Never touches the network.

    ``dinov2_vits14``, ``b``, ``l`` and ``g``, with ``_reg`` for four registers, are the ViTs of DINOv2, whose patches have 14 pixels.

    Raises:
        ValueError: for an unknown name, listing what there is.
    """
    if name in VIT_SIZES:
        embed_dim, depth, num_heads = VIT_SIZES[name]
        return VisionTransformer(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, drop_path_rate=drop_path_rate
        )
    if name.removesuffix("_reg") in _DINOV2:
        embed_dim, depth, num_heads = VIT_SIZES[_DINOV2[name.removesuffix("_reg")]]
        registers = name.endswith("_reg")
        return VisionTransformer(
            img_size, 14, in_chans, embed_dim, depth, num_heads, drop_path_rate=drop_path_rate, registers=4 * registers,
            layer_scale=1e-5, ffn="swiglu" if name.startswith("dinov2_vitg") else "mlp",
            position_offset=0.0 if registers else 0.1, position_antialias=registers,
        )  # fmt: skip
    if name.startswith("timm/"):
        return timm_model(name.removeprefix("timm/"), img_size, in_chans, drop_path_rate)
    if name in cnn_names():
        return torchvision_cnn(name, in_chans, drop_path_rate)
    raise ValueError(
        f"unknown backbone {name!r}; there are {', '.join(VIT_SIZES)}, {', '.join(_DINOV2)} (or with _reg), timm/NAME (with timm installed), "
        f"any nn.Module, and torchvision's {', '.join(cnn_names())}"
    )


def example_images(backbone: nn.Module, img_size: int | tuple[int, int], in_chans: int) -> torch.Tensor:
    """One black image (1, C, H, W) that the backbone takes: of its own size and channels where it tells them.

    Raises:
        ValueError: if it takes neither ``img_size`` nor a usual size.
    """
    weight = next(iter(backbone.parameters()), torch.empty(0))
    sizes = [(img_size, img_size) if isinstance(img_size, int) else tuple(img_size)]
    if isinstance(backbone, VisionTransformer):
        sizes = [tuple(side * backbone.patch_size for side in backbone.grid)]
    convolution = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else in_chans
    failure = None
    for size in dict.fromkeys([*sizes, (224, 224), (96, 96), (64, 64), (32, 32)]):
        images = torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype)
        try:
            with torch.no_grad():
                features_at(backbone, images)
            return images
        except ValueError as error:
            failure = failure or error
    raise failure


def feature_dim(backbone: nn.Module, images: torch.Tensor) -> int:
    """Width D of the features, found by a forward pass of ``images`` (B, C, H, W)."""
    with torch.no_grad():
        return features_at(backbone, images).shape[1]


def freeze_unused(backbone: nn.Module, images: torch.Tensor) -> None:
    """Freezes the parameters that play no part in the features (a mask token, a forgotten classifier), and says so.

    Trainable parameters without a gradient stop distributed training with an error that does not name them.
    """
    if isinstance(backbone, VisionTransformer):  # ours has none
        return
    with torch.enable_grad():
        features = features_at(backbone, images)
        trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(features.sum(), trainable.values(), allow_unused=True) if trainable else ()
    unused = [name for name, gradient in zip(trainable, gradients) if gradient is None]
    for name in unused:
        trainable[name].requires_grad_(False)
    if unused:
        log.warning("frozen, because the features do not depend on them: %s", ", ".join(unused))


def features_at(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of ``images`` (B, C, H, W) with the backbone in evaluation mode, its modes restored afterwards.

    Raises:
        ValueError: with the size and the remedy, if the backbone fails on it or gives something else than (B, D).
    """
    modes = {module: module.training for module in backbone.modules()}
    size = f"{images.shape[-2]}×{images.shape[-1]} images of {images.shape[1]} channels"
    try:
        features = backbone.eval()(images)
    except Exception as error:
        raise ValueError(
            f"the backbone {type(backbone).__name__} cannot take {size}: {error}. "
            "Choose crop sizes (and img_size, in_chans) that it takes, or a backbone that takes any size"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"the backbone {type(backbone).__name__} must map {size} to features (B, D), got {got} for B = {len(images)}; "
            "pool and flatten its output"
        )
    return features


def redrawn(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the backbone in evaluation mode with its weights drawn anew: to see what the features are worth untrained.

    Parameters that none of its modules' ``reset_parameters`` draws stay as they are, and the log names them.
    """
    device = next(backbone.parameters()).device
    copied = copy.deepcopy(backbone).cpu()
    drawn = set()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part in reversed(list(copied.modules())):  # the whole last: it may overrule its parts
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
                drawn.update(part.parameters(recurse=False))
    kept = [name for name, parameter in copied.named_parameters() if parameter not in drawn]
    if kept:
        log.warning("not drawn anew, since nothing says how: %s", ", ".join(kept))
    return copied.to(device).eval()
