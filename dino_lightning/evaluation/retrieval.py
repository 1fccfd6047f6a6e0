"""Ranking by similarity: average precision with positives and images that do not count, and the features that are ranked."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_lightning.evaluation.spread import doubled

_QUERIES = 256  # that are ranked at a time


class Ranking(NamedTuple):
    """Of some queries: ``mean_ap``, ``precisions`` at the ranks that were asked for, and the ``aps`` (Q,), NaN for queries that have no
    positives and do not count.
    """

    mean_ap: float
    precisions: tuple[float, ...]
    aps: np.ndarray


def average_precision(ranks: np.ndarray, positives: int, trapezoid: bool = True) -> float:
    """Of one query.

    Args:
        ranks: (n,) places of the positives that were found, counted from 0, ascending.
        positives: how many there are, found or not.
        trapezoid: the area below the line through precisions and recalls, as in the evaluation of revisited Oxford and Paris
            (Radenović et al. 2018), Copydays and the reference; else the mean precision at the positives, the usual definition.
    """
    before = np.arange(len(ranks))
    after = (before + 1) / (ranks + 1)
    if not trapezoid:
        return float(after.sum() / positives)
    at_last = np.divide(before, ranks, out=np.ones(len(ranks)), where=ranks > 0)  # the precision one place earlier
    return float((at_last + after).sum() / (2 * positives))


def score(
    order: Iterable[np.ndarray],
    positives: Sequence[np.ndarray],
    ignored: Sequence[np.ndarray] | None = None,
    at: Sequence[int] = (1, 5, 10),
    trapezoid: bool = True,
) -> Ranking:
    """Mean average precision, and mean precision among the first few.

    Images that are ignored (junk, or the query itself) are taken out of the ranking before anything is counted. The precision at k of
    a query is that at its last positive, if that comes earlier (the protocol of revisited Oxford and Paris).

    Args:
        order: (Q, n) images of the database for each query, the most similar first; all of them, or the first n. One after the other
            will do (``ranked``).
        positives: for each query, its images in the database.
        ignored: for each query, those that do not count.
        at: ranks k.
        trapezoid: as for ``average_precision``.

    Raises:
        ValueError: if no query has positives, or a rank is below 1.
    """
    if min(at, default=1) < 1:
        raise ValueError(f"ranks to give the precision at begin with 1, got {tuple(at)}")
    aps, precisions = np.full(len(positives), np.nan), np.full((len(positives), len(at)), np.nan)
    for query, ranked in enumerate(order):
        wanted = np.unique(positives[query])
        if not len(wanted):
            continue
        if ignored is not None:
            ranked = ranked[~np.isin(ranked, ignored[query])]
        ranks = np.flatnonzero(np.isin(ranked, wanted))
        aps[query] = average_precision(ranks, len(wanted), trapezoid)
        last = ranks[-1] + 1 if len(ranks) else len(ranked)
        for column, k in enumerate(at):
            among = min(last, k)
            precisions[query, column] = (ranks < among).sum() / among
    if np.isnan(aps).all():
        raise ValueError("no query has positives in the database: nothing can be ranked")
    return Ranking(float(np.nanmean(aps)), tuple(np.nanmean(precisions, axis=0).tolist()), aps)


def rank(bank: Tensor, queries: Tensor, n: int | None = None) -> np.ndarray:
    """The images of a bank (N, D) for each query (Q, D) by falling inner product, the first ``n`` or all (Q, n); of equals the lower first."""
    return np.stack(list(ranked(bank, queries, n)))


def ranked(bank: Tensor, queries: Tensor, n: int | None = None) -> Iterator[np.ndarray]:
    """The rows of ``rank``, of which a few hundred are in memory."""
    for some in queries.split(_QUERIES):
        yield from (some @ bank.T).sort(dim=1, descending=True, stable=True).indices[:, :n].int().cpu().numpy()


def gem(patches: Tensor, p: float = 4.0, least: float = 1e-6) -> Tensor:
    """Generalised mean over places (Radenović et al. 2018): (B, D, h, w) → (B, D), of values clamped from below."""
    return patches.clamp(min=least).pow(p).mean(dim=(2, 3)).pow(1 / p)


class Whitening:
    """Directions of equal variance, learned from features of other images.

    Args:
        features: (n, D) to learn from.
        centred: take the covariance about the mean. The reference's evaluation of copy detection takes it about zero, though it then
            subtracts the mean: that is the default.
        least: eigenvalues below this share of the greatest are raised to it.

    Raises:
        ValueError: for fewer than two features.
    """

    def __init__(self, features: Tensor, centred: bool = False, least: float = 1e-5) -> None:
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"whitening is learned from features (n, D) of at least two images, got {tuple(features.shape)}")
        features = doubled(features)
        self.mean = features.mean(dim=0)
        about = features - self.mean if centred else features
        variances, self.axes = torch.linalg.eigh(about.T @ about / len(about))
        self.scales = variances.clamp(min=least * variances.max()).rsqrt()

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) → (N, D), the directions of the least variance first."""
        return ((doubled(features) - self.mean) @ self.axes * self.scales).to(features)
