"""Classes of pixels by features of patches, and objects that nobody named: how well they are found."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning.evaluation.spread import doubled


class Confusion:
    """Counts of pixels by true and found class, and the intersection over union that they make.

    Args:
        classes: C; classes are 0 to C − 1, and any other number in a truth does not count.
    """

    def __init__(self, classes: int) -> None:
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        self.counts = torch.zeros(classes, classes, dtype=torch.long)  # [truth, found]

    def update(self, found: Tensor, truth: Tensor) -> None:
        """Of maps of one shape, whole numbers; ``found`` are classes."""
        classes, found, truth = len(self.counts), found.flatten().long(), truth.flatten().long()
        counts = (truth >= 0) & (truth < classes)
        pairs = torch.bincount(classes * truth[counts] + found[counts], minlength=classes**2)
        self.counts += pairs.unflatten(0, (classes, classes)).cpu()

    def iou(self) -> Tensor:
        """(C,): intersection over union of each class; NaN of a class that is neither true nor found anywhere."""
        both = self.counts.diag()
        return both / (self.counts.sum(dim=0) + self.counts.sum(dim=1) - both).double()

    def mean_iou(self) -> float:
        """The mean of ``iou()`` over the classes that occur."""
        return self.iou().nanmean().item()


class LinearSegmenter(nn.Module):
    """A linear classifier of patch features, whose logits are interpolated to the pixels (the protocol of DINOv2, section 7.4).

    Args:
        width: D of the features, which are normalised over the batch first.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # pyright: ignore[reportArgumentType]  it has one

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, D, h, w) → logits (B, C, H, W) of this size in pixels."""
        return F.interpolate(self.head(self.norm(patches)), size, mode="bilinear", align_corners=False)


class Discovered(NamedTuple):
    """``mask``: bool (h, w), patches of the object; ``box``: left, top, right, bottom in patches, right and bottom behind the last."""

    mask: np.ndarray
    box: tuple[int, int, int, int]


def discover_object(features: Tensor, k: int = 100) -> Discovered:
    """The object of an image, by features alone (LOST, Siméoni et al. 2021, section 3.2).

    The seed is the patch that correlates with the fewest others, since objects are smaller than what is around them; patches like it,
    among the ``k`` with the fewest, vote; what correlates with them is the object, as far as it hangs together with the seed.

    Args:
        features: (D, h, w) of the patches. What those of an image have in common, their mean, is taken off first (the paper takes the keys of
            the last block as they are).
        k: as above.
    """
    if features.ndim != 3:
        raise ValueError(f"expected features (D, h, w) of one image, got {tuple(features.shape)}")
    flat = doubled(features.flatten(1))
    flat = flat - flat.mean(dim=1, keepdim=True)
    correlation = flat.T @ flat
    degree = (correlation > 0).sum(dim=1)
    few = degree.argsort(stable=True)
    seed = few[0]
    voters = few[:k][correlation[seed, few[:k]] > 0]
    alike = (correlation[:, voters].sum(dim=1) > 0).unflatten(0, features.shape[1:]).cpu().numpy()
    mask = _connected(alike, divmod(int(seed), features.shape[2]))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Discovered(mask, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _connected(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The part of a mask that hangs together with a place in it, by sides; the place itself where it is not in it."""
    reached = np.zeros_like(mask)
    reached[seed] = True
    while True:
        padded = np.pad(reached, 1)
        grown = mask & (padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]) | reached
        if np.array_equal(grown, reached):
            return reached
        reached = grown


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    sides = [max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both) if both else 0.0


def corloc(found: Sequence[Sequence[float]], truths: Sequence[Sequence[Sequence[float]]], least: float = 0.5) -> float:
    """Correct localisation: the share of images whose box overlaps with one of its true boxes by more than ``least``.

    Images without a true box do not count.

    Raises:
        ValueError: if there are none with one.
    """
    hits = [any(box_iou(box, true) > least for true in boxes) for box, boxes in zip(found, truths, strict=True) if len(boxes)]
    if not hits:
        raise ValueError("no image has a true box to compare with")
    return sum(hits) / len(hits)
