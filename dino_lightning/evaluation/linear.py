"""Features for a linear classifier, as the paper's protocol takes them from a backbone (section 4.1)."""

import torch
from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer

_WIDE = 768  # a ViT-B


def linear_protocol(backbone: nn.Module) -> tuple[int, bool]:
    """(n_blocks, mean_patch) of the reference's protocol: what ``probe_features`` takes of this backbone.

    A ViT narrower than 768 gives the class tokens of its last 4 blocks, a wider one that of the last block with the mean of
    its patch tokens; anything else gives its features as they are, (1, False).
    """
    if not isinstance(backbone, VisionTransformer):
        return 1, False
    return (1, True) if backbone.embed_dim >= _WIDE else (min(4, len(backbone.blocks)), False)


def probe_features(backbone: nn.Module, images: Tensor, *, n_blocks: int = 1, mean_patch: bool = False) -> Tensor:
    """Images (B, C, H, W), normalised, → features (B, F) in float32, in the mode in which the backbone is.

    Of a ViT of this package, F is its width times (n_blocks + mean_patch); of others, the width of their features. (The
    reference interleaves class and mean patch token; to a linear classifier the order is all the same.)

    Args:
        backbone: any that maps images to features (B, D).
        images: of a size that it takes.
        n_blocks: class tokens of so many last blocks, each after the final norm, the oldest first.
        mean_patch: append the mean of the last block's patch tokens, after the norm.

    Raises:
        ValueError: if a ViT has fewer blocks, or another backbone is asked for more than its features.
    """
    if not isinstance(backbone, VisionTransformer):
        if n_blocks != 1 or mean_patch:
            raise ValueError(
                f"n_blocks={n_blocks} and mean_patch={mean_patch} are for a ViT of this package; a "
                f"{type(backbone).__name__} has no such tokens: leave them out to take its features as they are"
            )
        return backbone(images).float()
    if not 1 <= n_blocks <= len(backbone.blocks):
        raise ValueError(f"n_blocks must lie between 1 and the depth {len(backbone.blocks)}, got {n_blocks}")
    layers = backbone.forward_features(images, range(-n_blocks, 0))
    parts = [layer.cls for layer in layers]
    if mean_patch:
        parts.append(layers[-1].patches.mean(dim=(2, 3)))
    return torch.cat(parts, dim=1).float()
