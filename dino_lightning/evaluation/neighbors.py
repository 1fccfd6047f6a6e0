"""Search over features: the nearest of a bank, and pairs of nearly the same. Cosine similarity, in chunks."""

import logging

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

log = logging.getLogger(__name__)

_MOST_PAIRS = 1_000_000


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The k features of the bank that are most similar to each query.

    At most ``chunk`` queries and ``chunk`` features of the bank, which may be mapped from the disk, are compared at a time.

    Args:
        bank: (N, D) features, on any device.
        queries: (M, D) features; the work is done on their device.
        k: neighbours; more than N are clamped to N, and the log says so.

    Returns:
        Cosine similarities (M, k), greatest first, and indices into the bank (M, k), of equal similarities the lower first.

    Raises:
        ValueError: if there is nothing to compare, the widths differ, or a feature is not finite.
    """
    _check("bank", bank)
    _check("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank features have width {bank.shape[1]}, queries {queries.shape[1]}: not the same backbone")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > len(bank):
        log.warning("k = %d is more than the %d features of the bank; using k = %d", k, len(bank), len(bank))
        k = len(bank)
    found = [_nearest(bank, normalized(some), k, chunk) for some in queries.split(chunk)]
    similarities, indices = (torch.cat(parts) for parts in zip(*found))
    return similarities, indices


def _nearest(bank: Tensor, queries: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    best = queries.new_zeros(len(queries), 0)
    where = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), chunk):
        part = normalized(bank[start : start + chunk].to(queries.device))
        similarity, index = (queries @ part.T).clamp(-1, 1).topk(min(k, len(part)), dim=1)
        best, where = torch.cat([best, similarity], dim=1), torch.cat([where, index + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, kept)
    where, order = where.sort(dim=1)
    best, ranked = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, where.gather(1, ranked)


@torch.no_grad()
def near_duplicates(
    features: Tensor,
    threshold: float,
    *,
    chunk: int = 4096,
    device: torch.device | str | None = None,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """All pairs of features whose cosine similarity is at least ``threshold``.

    ``chunk``² similarities are computed at a time: the memory is that of a chunk and of the pairs.

    Args:
        features: (N, D), on any device or mapped from the disk.
        threshold: least similarity, in (-1, 1].
        device: for the work; by default that of the features.
        progress: title of a progress bar; None for none.

    Returns:
        Similarities (P,), greatest first, and pairs of indices (P, 2), i < j, of equal similarities in their order; on the host.

    Raises:
        ValueError: if there are more than a million such pairs, nothing to compare, or a feature is not finite.
    """
    _check("features", features)
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold must lie in (-1, 1], got {threshold}: it is a cosine similarity, such as 0.95")
    device = features.device if device is None else device
    similarities, pairs, count = [torch.zeros(0)], [torch.zeros(0, 2, dtype=torch.long)], 0
    for row in tqdm(range(0, len(features), chunk), desc=progress, disable=progress is None, leave=False):
        left = normalized(features[row : row + chunk].to(device))
        for column in range(row, len(features), chunk):
            right = left if column == row else normalized(features[column : column + chunk].to(device))
            similarity = (left @ right.T).clamp(-1, 1)
            # Entry (a, b) is the pair (row + a, column + b).
            alike = (similarity >= threshold).triu(diagonal=1 + row - column)
            count += int(alike.sum())
            if count > _MOST_PAIRS:
                raise ValueError(f"more than {_MOST_PAIRS} pairs have a similarity of at least {threshold}; raise the threshold")
            similarities.append(similarity[alike].cpu())
            pairs.append(alike.nonzero().cpu() + torch.tensor([row, column]))
    similarity, pair = torch.cat(similarities), torch.cat(pairs)
    order = (pair[:, 0] * len(features) + pair[:, 1]).argsort()
    order = order[similarity[order].argsort(descending=True, stable=True)]
    return similarity[order], pair[order]


def normalized(features: Tensor) -> Tensor:
    """(N, D) → float32 of unit length. A feature of zeros stays: it is similar to none.

    Raises:
        ValueError: if a number is not finite.
    """
    features = features.float()
    if not features.isfinite().all():
        raise ValueError("some features are not finite: the network that made them has diverged, or the file is damaged")
    return F.normalize(features, dim=1)


def _check(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected {name} (N, D) with N ≥ 1, got {tuple(features.shape)}")
