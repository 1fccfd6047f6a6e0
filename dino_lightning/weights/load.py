"""Backbones from weights of any origin, and weights into networks that are there, with a report of what fitted."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer
from dino_lightning.backbones.features import evaluating, first_convolution
from dino_lightning.backbones.positions import interpolate_positions
from dino_lightning.weights.networks import facts_of, network_for, vit_arguments
from dino_lightning.weights.source import Source, open_source

log = logging.getLogger(__name__)

# Parts of published files that have nothing to do with features: classifiers, poolers, what masked training needs.
_MASK_TOKEN = "mask_token"
_BESIDE = ("head.", "fc.", "classifier.", "pooler.", _MASK_TOKEN)
_WITHIN = ("blocks.", "layer", "register_tokens", "norm")  # parts without which the features would be others


class Report(NamedTuple):
    """What a load found: the number of ``matched`` tensors, names ``missing`` in the source, names ``unexpected`` in it."""

    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        rest = [f"{kind}: {_listed(names)}" for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)) if names]
        return "; ".join([f"{self.matched} tensors matched", *rest])


def load_backbone(
    source: str | Path | nn.Module,
    *,
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
    network: Literal["teacher", "student"] = "teacher",
) -> nn.Module:
    """A trained backbone, in evaluation mode: images (B, C, H, W) → features (B, D).

    ViTs become a ``VisionTransformer``, which takes any size that its patches divide, ResNets that of torchvision, what ``cpu`` and ``auto``
    train without a GPU a ``SmallResNet``. The log says how many tensors matched, and what was left over. For other numbers of channels the
    first convolution is adapted: for one channel its weights are summed over red, green and blue; for n, they are repeated in turn, times
    3/n.

    Args:
        source: a file (``.pth``, ``.ckpt``, ``.bin``, ``.safetensors``) of the reference, with the backbone alone or a whole
            checkpoint, of DINOv2, of timm, or of this package; a folder that transformers, timm or ``dino-lightning export``
            wrote; a name of torch.hub (``dino_vits16``, ``dinov2_vitb14_reg``, ...: downloaded once), or ``timm/NAME`` with
            pretrained weights; or a ViT of timm or transformers.
        img_size: pixels, int or (H, W): size to whose grid the positions are interpolated; by default they stay as they are.
        in_chans: channels of the images; by default those of the source.
        num_heads: attention heads, where the source does not tell and the shape is not a usual one.
        drop_path_rate: of a ViT, for further training.
        network: which one of a whole checkpoint.

    Raises:
        FileNotFoundError: if there is no such source.
        ConnectionError: if a published one cannot be downloaded, saying where to put the file.
        ValueError: if the source holds no weights of such a network, not all of them, or such of other shapes.
    """
    found = open_source(source, network)
    facts = {**found.facts, **({"num_heads": num_heads} if num_heads else {})}
    try:
        backbone = network_for(found.backbone, facts, drop_path_rate, img_size)
    except ValueError as error:
        raise ValueError(f"{found.name}: {error}") from error
    load_into(backbone, found._replace(facts=facts))
    if found.module is not None:
        _check_features(found.module, backbone, found.name)
    if img_size is not None and isinstance(backbone, VisionTransformer):
        backbone.set_grid(img_size)
    if in_chans is not None:
        _adapt_first_convolution(backbone, in_chans)
    return backbone.eval()


def load_into(backbone: nn.Module, source: Source) -> Report:
    """Copies weights into a backbone that is there; positions are interpolated to its grid, the first convolution is adapted.

    What the source has beside a backbone is named in the log, and left out. A mask token that the source lacks stays as it is.

    Raises:
        ValueError: if nothing matches, something is missing, of another shape or of a part that the backbone does not have; of a
            published file, if anything is left over but a classifier.
    """
    own = backbone.state_dict()
    # A network of another library may bear the names that the source has, before they become ours.
    weights = dict(source.plain if own.keys() - {_MASK_TOKEN} <= source.plain.keys() else source.backbone)
    if _MASK_TOKEN in own and getattr(weights.get(_MASK_TOKEN), "shape", None) != own[_MASK_TOKEN].shape:
        log.info("%s has no mask token for this backbone, which keeps its own", source.name)
        weights.pop(_MASK_TOKEN, None)
        del own[_MASK_TOKEN]
    matching = [name for name in own if name in weights]
    missing = tuple(name for name in own if name not in weights and not name.endswith("num_batches_tracked"))
    unexpected = tuple(name for name in weights if name not in own)
    report = Report(len(matching), missing, unexpected)
    if not matching:
        raise ValueError(
            f"nothing in {source.name} matches the backbone: it has {_listed(tuple(weights))}, the backbone has {_listed(tuple(own))}"
        )
    if missing:
        plain = all(".ls1." in name or ".ls2." in name for name in missing)
        remedy = ". It has no LayerScale: build the backbone with layer_scale null" if plain else ""
        raise ValueError(f"{source.name} is not a whole backbone of this kind: {report}{remedy}")
    if any(name.startswith(_WITHIN) for name in unexpected):
        raise ValueError(f"{source.name} is of a network with other parts: {report}. Choose the backbone that it was trained with")
    if source.published and any(not name.startswith(_BESIDE) for name in unexpected):
        raise ValueError(f"the file of {source.name} is not what was published under this name: {report}")
    weights = {name: weights[name] for name in matching}
    if isinstance(backbone, VisionTransformer):
        _check_function(backbone, source)
        weights["pos_embed"] = _fitted(weights["pos_embed"], backbone, source)
    first = f"{first_convolution(backbone)[0]}.weight"
    if first in weights:
        weights[first] = adapted(weights[first], own[first].shape[1])
    wrong = [f"{name} {tuple(v.shape)} instead of {tuple(own[name].shape)}" for name, v in weights.items() if v.shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"{source.name} is of another network: {_listed(tuple(wrong))}. Choose the backbone and patch_size that it was trained with"
        )
    broken = tuple(name for name, value in weights.items() if not value.isfinite().all())
    if broken:
        raise ValueError(f"{source.name} holds values that are not finite ({_listed(broken)}): it is damaged, or of a run that diverged")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    log.log(logging.WARNING if unexpected else logging.INFO, "%s: %s", source.name, report)
    return report


def start_from(source: str | Path, backbone: nn.Module, head: nn.Module | None = None, center: Tensor | None = None) -> None:
    """Copies the weights of a source into a backbone, and where a head is given, into it and the centre (1, K).

    Raises:
        ValueError: as ``load_into``, or if the source has no head of this shape.
    """
    found = open_source(source)
    load_into(backbone, found)
    if head is None:
        return
    if not found.head:
        raise ValueError(f"{found.name} holds no projection head; leave weights_with_head out for a new one")
    own = head.state_dict()
    wrong = [
        name for name in own.keys() | found.head.keys() if getattr(found.head.get(name), "shape", 0) != getattr(own.get(name), "shape", 0)
    ]
    if wrong or (found.center is not None and found.center.shape != center.shape):
        raise ValueError(
            f"the projection head of {found.name} is another one ({_listed(tuple(sorted(wrong)))} differ); choose its out_dim "
            f"({len(found.head['last_layer.weight_v'])}), hidden_dim, bottleneck_dim and head_layers"
        )
    head.load_state_dict(found.head)
    if found.center is not None:
        center.copy_(found.center)


def adapted(weight: Tensor, in_chans: int) -> Tensor:
    """Weights (O, C, h, w) of a first convolution for ``in_chans`` channels.

    For one channel, their sum: a gray image gives what its copy in all channels gave. For n, the channels in turn, times C/n:
    of images whose channels are all alike, the same comes out.
    """
    channels = weight.shape[1]
    if in_chans == channels:
        return weight
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)


def _fitted(positions: Tensor, vit: VisionTransformer, source: Source) -> Tensor:
    """Positions (1, 1 + h·w, D) on the grid of ``vit``, interpolated as in the network they come from."""
    size = [side * vit.patch_size for side in vit.grid]
    theirs = vit_arguments(source.backbone, source.facts, wanted_size=size)
    grid = tuple(side // theirs["patch_size"] for side in theirs["img_size"])
    if grid == vit.grid:
        return positions
    return interpolate_positions(positions.float(), grid, vit.grid, theirs["position_offset"], theirs["position_antialias"])


def _check_function(vit: VisionTransformer, source: Source) -> None:
    """Weights of other heads, or for another epsilon, have the same shapes, and give other features."""
    own = facts_of(vit)
    for name, what in (("num_heads", "attention heads"), ("norm_eps", "as epsilon of its norms")):
        theirs = source.facts.get(name, own[name])
        slight = name == "norm_eps" and max(theirs or 0, own[name]) <= 1e-5  # 1e-12 in transformers: a difference in the 4th digit
        if theirs is not None and theirs != own[name] and not slight:
            raise ValueError(f"{source.name} is of a ViT with {theirs} {what}, the backbone has {own[name]}; choose the same")


@torch.no_grad()
def _check_features(module: nn.Module, backbone: nn.Module, name: str) -> None:
    """A network of another library may compute something else from the same weights; where it gives features, they are compared."""
    size = [side * backbone.patch_size for side in backbone.grid] if isinstance(backbone, VisionTransformer) else (64, 64)
    random = torch.Generator().manual_seed(0)
    channels = first_convolution(backbone)[1].in_channels
    weight = next(module.parameters())
    images = torch.randn(1, channels, *size, generator=random)
    with evaluating(module.modules()):
        expected = _features_of(module, images.to(weight))
    if expected is None:
        return
    found = backbone.eval()(images)
    difference = (expected.float().cpu() - found).abs().max().item()
    if difference > (1e-3 if weight.dtype == torch.float32 else 3e-2) * found.abs().max().item():
        raise ValueError(
            f"{name} computes something else from the same weights (its features differ by {difference:.2g}): it is no plain ViT or "
            "ResNet. Use it itself as the backbone"
        )


def _features_of(module: nn.Module, images: Tensor) -> Tensor | None:
    if hasattr(module, "forward_head"):  # timm
        return module.forward_head(module.forward_features(images), pre_logits=True)
    output = module(images)
    if hasattr(output, "last_hidden_state"):  # transformers
        return output.last_hidden_state[:, 0]
    return output if isinstance(output, Tensor) and isinstance(module, VisionTransformer) else None


def _adapt_first_convolution(backbone: nn.Module, in_chans: int) -> None:
    _, convolution = first_convolution(backbone)
    convolution.weight = nn.Parameter(adapted(convolution.weight.detach(), in_chans))
    convolution.in_channels = in_chans


def _listed(names: tuple[str, ...], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
