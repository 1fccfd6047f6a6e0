"""k-means clusters of features (optional extra ``clusters``), and how well they agree with labels."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from dino_lightning.evaluation.neighbors import normalized

_LARGE = 50_000  # features beyond which mini-batches do
_STARTS: Any = 5  # which scikit-learn leaves without a type


def kmeans(features: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means of the L2-normalised features, the best of five starts; on mini-batches beyond 50,000 features.

    Holds a normalised copy of the features in memory.

    Args:
        features: (N, D).
        k: clusters, at most N.
        seed: of the starts (and mini-batches).

    Returns:
        Cluster of each feature (N,), the largest cluster 0, and the centres (k, D).

    Raises:
        ModuleNotFoundError: without scikit-learn, saying how to install it.
        ValueError: if k does not lie between 1 and N, or a feature is not finite.
    """
    check_sklearn()
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if not 1 <= k <= len(features):
        raise ValueError(f"k must lie between 1 and the {len(features)} features, got {k}")
    if len(features) <= _LARGE:
        algorithm = KMeans(n_clusters=k, n_init=_STARTS, random_state=seed)
    else:
        algorithm = MiniBatchKMeans(n_clusters=k, n_init=_STARTS, random_state=seed, batch_size=max(4096, 16 * k))
    fitted = algorithm.fit(normalized(features).cpu().numpy())
    clusters = torch.from_numpy(fitted.labels_).long()
    by_size = clusters.bincount(minlength=k).argsort(descending=True, stable=True)
    rank = torch.empty_like(by_size).scatter_(0, by_size, torch.arange(k))
    return rank[clusters], torch.from_numpy(fitted.cluster_centers_)[by_size]


def has_sklearn() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def check_sklearn() -> None:
    """Raises ModuleNotFoundError without scikit-learn, saying how to install it."""
    if not has_sklearn():
        raise ModuleNotFoundError("k-means needs scikit-learn: pip install scikit-learn", name="sklearn")


def purity(clusters: Tensor, labels: Tensor) -> float:
    """Share of the samples that have the most frequent label of their cluster; (N,) and (N,) of integers from 0.

    It grows with the number of clusters, up to 1 with one for each sample: compare with ``by_chance``.
    """
    n_labels = int(labels.max()) + 1
    counts = (clusters * n_labels + labels).bincount(minlength=(int(clusters.max()) + 1) * n_labels)
    return counts.view(-1, n_labels).amax(dim=1).sum().item() / len(labels)


def nmi(clusters: Tensor, labels: Tensor) -> float:
    """Normalised mutual information of clusters (N,) and labels (N,): 0 if independent, 1 if the same partition."""
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # torch warns of the metric's tensors if nobody decides
        return normalized_mutual_info_score(clusters, labels).item()


def by_chance(measure: Callable[[Tensor, Tensor], float], clusters: Tensor, labels: Tensor, draws: int = 10, seed: int = 0) -> float:
    """What ``measure`` gives on average where the samples are dealt at random to clusters of the same sizes."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = (clusters[torch.randperm(len(clusters), generator=generator)] for _ in range(draws))
    return sum(measure(dealt, labels) for dealt in shuffled) / draws
