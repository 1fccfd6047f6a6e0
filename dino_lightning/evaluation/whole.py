"""Features of whole images, of any shape and at several sizes, for retrieval and copy detection."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning.backbones import VisionTransformer, features_at
from dino_lightning.evaluation.retrieval import gem
from dino_lightning.evaluation.spatial import spatial_features

Pooling = Literal["cls", "gem", "cls+gem"]
SQUARE_ROOTS = (1.0, 2**-0.5, 0.5)  # the sizes of multi-scale features


def thumbnail(pixels: np.ndarray, longest: int) -> Tensor:
    """An image (H, W, C) of uint8 → (C, h, w) whose longer side is ``longest`` at most; it is never enlarged, and its shape stays.

    By Pillow's ``thumbnail`` with its Lanczos filter, as in the reference.
    """

    def shrunk(image: Image.Image) -> Image.Image:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return image

    return _by_pillow(pixels, shrunk)


def squeezed(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """An image (H, W, C) of uint8 → (C, h, w), whatever its shape was, by Pillow's bicubic filter."""
    return _by_pillow(pixels, lambda image: image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _by_pillow(pixels: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Of other than three channels each by itself."""
    if pixels.shape[2] == 3:
        return torch.from_numpy(np.array(change(Image.fromarray(pixels)))).permute(2, 0, 1)
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(pixels.shape[2])]
    return torch.from_numpy(np.stack([np.array(change(plane)) for plane in planes]))


@torch.no_grad()
def whole_features(backbone: nn.Module, images: Tensor, scales: Sequence[float] = (1.0,), pooling: Pooling = "cls") -> Tensor:
    """Normalised images (B, C, H, W) → features (B, F), the mean of those at each scale (bilinear); not of unit length.

    What goes over a multiple of the patch size at the right and at the bottom is cut off, as a patch embedding does.

    Args:
        backbone: any; for ``gem`` one with a feature map.
        scales: of the sides.
        pooling: the backbone's features (of a ViT the class token), the generalised mean (p = 4) of its patch features, or one beside the other.
    """
    multiple = backbone.patch_size if isinstance(backbone, VisionTransformer) else 1
    total: Tensor | None = None
    for scale in scales:
        scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        height, width = (max(multiple, side // multiple * multiple) for side in scaled.shape[-2:])
        if height > scaled.shape[-2] or width > scaled.shape[-1]:
            scaled = F.interpolate(scaled, (height, width), mode="bilinear", align_corners=False)  # smaller than one patch
        scaled = scaled[..., :height, :width]
        parts = [features_at(backbone, scaled).float()] if pooling.startswith("cls") else []
        if pooling.endswith("gem"):
            parts.append(gem(spatial_features(backbone, scaled)))
        found = torch.cat(parts, dim=1)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("give at least one scale")
    return total / len(scales)
