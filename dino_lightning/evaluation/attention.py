"""What attention maps mark: masks of where their mass lies, and their overlap with true masks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that hold ``mass`` of each map's attention: (..., h, w) → bool (..., h, w) (paper, figure 4)."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass must lie in (0, 1], got {mass}")
    flat = attention.flatten(-2)
    values, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values  # what the stronger patches hold already
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, before < mass * (1 - 1e-6)).unflatten(-1, attention.shape[-2:])


def mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each head's mask with the true one, which may be finer.

    Args:
        masks: bool (B, heads, h, w).
        truth: bool (B, H, W), the object's pixels; images without any are not allowed.

    Returns:
        (B, heads).
    """
    if not truth.flatten(1).any(dim=1).all():
        raise ValueError("every true mask must mark at least one pixel; leave images without an object out")
    masks = F.interpolate(masks.float(), size=truth.shape[-2:], mode="nearest").bool()
    truth = truth[:, None]
    return (masks & truth).sum(dim=(-2, -1)) / (masks | truth).sum(dim=(-2, -1))


def best_head_iou(attention: Tensor, truth: Tensor, mass: float = 0.6) -> Tensor:
    """Overlap with the truth (B, H, W) of the head that overlaps best in each image, (B, heads, h, w) → (B,) (paper, figure 4)."""
    return mask_iou(mass_mask(attention, mass), truth).amax(dim=1)
