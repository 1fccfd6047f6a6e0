"""Labels carried through a film by the similarity of patches (paper, section 4.2.2; Jabri et al. 2020), and how well."""

import math
from collections import deque

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_SCORES = 1 << 24  # similarities at a time


class Propagation:
    """Carries the labels of a first frame on from frame to frame: what each place is, the places most like it in earlier frames say.

    Args:
        features: (D, h, w) of the first frame.
        labels: (C, h, w) of it: how much each place belongs to each of C labels.
        frames: the latest ones that are asked, beside the first.
        radius: rows and columns by which a place may have moved since any of them.
        k: places that are asked, of all these frames together.
        temperature: of their votes, exp(cosine / temperature).
    """

    def __init__(self, features: Tensor, labels: Tensor, frames: int = 7, radius: int = 12, k: int = 5, temperature: float = 0.1) -> None:
        if features.shape[1:] != labels.shape[1:]:
            raise ValueError(f"features are of {tuple(features.shape[1:])} places, labels of {tuple(labels.shape[1:])}")
        for name, value in {"frames": frames, "radius": radius}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if k < 1 or temperature <= 0:
            raise ValueError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
        self.radius, self.k, self.temperature = radius, k, temperature
        self._first = F.normalize(features.float(), dim=0), labels.float()
        self._latest: deque[tuple[Tensor, Tensor]] = deque(maxlen=frames)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """The next frame's features (D, h, w) → its labels (C, h, w)."""
        features = F.normalize(features.float(), dim=0)
        context = [self._first, *self._latest]
        known, labels = (torch.stack(part) for part in zip(*context))  # (n, D, h, w), (n, C, h, w)
        height, width = features.shape[1:]
        rows = self._rows_at_once(len(context), height, width)
        found = torch.cat([self._rows(features, known, labels, top, min(height, top + rows)) for top in range(0, height, rows)], dim=1)
        self._latest.append((features, found))
        return found

    def _rows_at_once(self, frames: int, height: int, width: int) -> int:
        """So many rows that their scores with the rows near them are few enough."""
        most = _SCORES // (frames * width * width)  # of rows · (rows + 2 · radius)
        rows = int((self.radius**2 + most) ** 0.5) - self.radius
        return max(1, rows if rows + 2 * self.radius < height else most // height)

    def _rows(self, features: Tensor, known: Tensor, labels: Tensor, top: int, end: int) -> Tensor:
        """The labels of the rows from ``top`` to ``end`` (C, rows, w). Only the rows of other frames that are near are looked at."""
        height, width = features.shape[1:]
        first, last = max(0, top - self.radius), min(height, end + self.radius)
        asked = features[:, top:end].flatten(1)  # (D, q)
        near = known[:, :, first:last].permute(1, 0, 2, 3).flatten(1)  # (D, n · rows · w)
        votes = labels[:, :, first:last].permute(1, 0, 2, 3).flatten(1)  # (C, n · rows · w)
        affinity = asked.T @ near / self.temperature
        y, x = (torch.arange(size, device=features.device) for size in (height, width))
        far = ((y[top:end, None] - y[first:last]).abs() > self.radius)[:, None, :, None] | ((x[:, None] - x).abs() > self.radius)[
            None, :, None
        ]
        affinity = affinity.unflatten(1, (len(known), -1)).masked_fill(far.flatten(2).flatten(0, 1)[:, None], -torch.inf).flatten(1)
        best, places = affinity.topk(min(self.k, affinity.shape[1]), dim=1)  # (q, k)
        weights = best.softmax(dim=1)  # exp(cosine / temperature), to a sum of 1
        return torch.einsum("cqk,qk->cq", votes[:, places], weights).unflatten(1, (end - top, width))


def region_similarity(found: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two masks (H, W); 1 if both are empty (Perazzi et al. 2016)."""
    union = np.logical_or(found, truth).sum()
    return float(np.logical_and(found, truth).sum() / union) if union else 1.0


def contour_accuracy(found: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F: harmonic mean of the shares of one mask's contour that lie near the other's (Perazzi et al. 2016).

    Args:
        found: mask (H, W).
        truth: likewise.
        tolerance: what is near, in shares of the diagonal, rounded up to pixels.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    contours = [_contour(mask.astype(bool)) for mask in (found, truth)]
    counts = [int(contour.sum()) for contour in contours]
    if not all(counts):  # neither has one: alike; only one has: nothing of it is near
        return float(counts[0] == counts[1])
    near = [_dilated(contour, radius) for contour in contours]
    precision, recall = ((contours[i] & near[1 - i]).sum() / counts[i] for i in (0, 1))
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here, right, below, beyond = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    contour = (here ^ right) | (here ^ below) | (here ^ beyond)
    contour[-1, -1] = False
    return contour


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within a distance of one that is set."""
    offsets = np.arange(-radius, radius + 1)
    disk = torch.from_numpy((offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32))
    near = F.conv2d(torch.from_numpy(mask.astype(np.float32))[None, None], disk[None, None], padding=radius)
    return near[0, 0].numpy() > 0.5
