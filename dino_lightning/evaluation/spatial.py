"""What a backbone makes of each place of an image: features on a grid, and maps of how much the places matter."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer, features_at

_CNN_STRIDE = 32  # of nearly all CNNs: their last grid covers images of a multiple of it exactly


class NoSpatialMapError(TypeError):
    """A backbone whose activations nowhere form a grid over the image."""


class SpatialMaps(NamedTuple):
    """``maps``: how much each place matters, not negative, (B, M, h, w). For people, the ``names`` of the M maps and
    ``what`` one of them shows.
    """

    maps: Tensor
    names: list[str]
    what: str


@torch.no_grad()
def spatial_maps(backbone: nn.Module, images: Tensor) -> SpatialMaps:
    """Normalised images (B, C, H, W) → how much their places matter to the backbone, float32.

    For a ViT of this package the class token's attention in the last block, a map for each head (paper, figure 1); for any
    other backbone one map, the L2 norm over the channels of its ``last_feature_map``.
    """
    if isinstance(backbone, VisionTransformer):
        maps = backbone.get_cls_attention(images).float()
        return SpatialMaps(maps, [f"head {head + 1}" for head in range(maps.shape[1])], "a head's attention")
    norms = last_feature_map(backbone, images).float().norm(dim=1, keepdim=True)
    return SpatialMaps(norms, ["feature norm"], "the feature norm")


@torch.no_grad()
def spatial_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) → features of their places (B, D, h, w), float32.

    For a ViT of this package the last block's patch tokens after the final norm, for any other its ``last_feature_map``.
    """
    if isinstance(backbone, VisionTransformer):
        return backbone.forward_features(images)[0].patches.float()
    return last_feature_map(backbone, images).float()


def last_feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last feature map (B, D, h, w) in the forward pass of images (B, C, H, W), in evaluation mode; modes are restored.

    That is the last 4-D output of a submodule with more than one position whose grid has the images' proportions, channels
    first or last. Where tokens (B, T, D) come later, as in a transformer, there is none.

    Raises:
        NoSpatialMapError: if there is none.
        ValueError: with the size and the remedy, if the backbone cannot take the images.
    """
    last: Tensor | None = None

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal last
        if not isinstance(output, Tensor) or len(output) != len(images):
            return
        if output.ndim == 4:
            either = (output, output.permute(0, 3, 1, 2))
            found = min(either, key=lambda one: _distortion(one.shape[-2:], images.shape[-2:]))
            last = found if _distortion(found.shape[-2:], images.shape[-2:]) <= 2 else last
        elif output.ndim == 3 and min(output.shape[1:]) > 1:  # (B, D, 1) is pooled
            last = None

    handles = [module.register_forward_hook(note) for module in backbone.modules()]
    try:
        features_at(backbone, images)
    finally:
        for handle in handles:
            handle.remove()
    if last is None:
        raise NoSpatialMapError(
            f"{type(backbone).__name__} has no last feature map (B, D, h, w) for images of {images.shape[-2]}×{images.shape[-1]} "
            "pixels: pictures need a ViT of this package, or a CNN of which a submodule gives such a map"
        )
    return last


def side_multiple(backbone: nn.Module) -> int:
    """Pixels of which the sides of images to look at should be a multiple."""
    return backbone.patch_size if isinstance(backbone, VisionTransformer) else _CNN_STRIDE


def _distortion(grid: Sequence[int], size: Sequence[int]) -> float:
    """How much longer a grid's steps over an image are one way than the other; infinite where it cannot be a grid over it."""
    steps = [pixels / positions for pixels, positions in zip(size, grid)]
    return max(steps) / min(steps) if grid[0] * grid[1] > 1 and min(steps) >= 1 else math.inf
