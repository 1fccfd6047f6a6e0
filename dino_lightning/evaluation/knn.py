"""Weighted k-nearest-neighbour classification, the protocol of the paper (section 4.1; Wu et al. 2018)."""

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

_SIMILARITIES_AT_ONCE = 2**26  # entries of a chunk's (queries, bank) matrix: 256 MiB in float32


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Share of the queries whose label the votes of their k nearest bank features get right.

    Features are L2-normalised here; a neighbour votes for its label with weight exp(cosine / temperature). The queries are
    taken in chunks: beside a normalised copy of the bank in float32, a few hundred MB of memory are enough whatever its size.

    Args:
        bank: (N, D) features that vote, on any device.
        bank_labels: (N,) their labels, integers from 0.
        queries: (M, D) features to classify.
        query_labels: (M,) their labels.
        k: neighbours; more than N are clamped to N, and the log says so.
        temperature: of the votes.

    Returns:
        (top-1, top-5) accuracy as fractions; with fewer than five classes, top-5 is top-all.

    Raises:
        ValueError: if there is nothing to compare, or the shapes do not fit.
    """
    _check(bank, bank_labels, queries, query_labels, k, temperature)
    if k > len(bank):
        log.warning("k = %d is more than the %d features of the bank; using k = %d", k, len(bank), len(bank))
        k = len(bank)
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    bank_labels, query_labels = bank_labels.to(bank.device), query_labels.to(bank.device)
    n_classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    hits = torch.zeros(2, dtype=torch.long, device=bank.device)
    chunk = max(1, _SIMILARITIES_AT_ONCE // max(len(bank), n_classes))
    for query, label in zip(queries.split(chunk), query_labels.split(chunk)):
        similarity, nearest = (query.to(bank.device) @ bank.T).topk(k, dim=1)  # (m, k)
        votes = similarity.new_zeros(len(query), n_classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        ranked = votes.topk(min(5, n_classes), dim=1).indices == label[:, None]
        hits += torch.stack([ranked[:, 0].sum(), ranked.sum()])
    top1, top5 = (hits / len(queries)).tolist()
    return top1, top5


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, temperature: float) -> None:
    for name, features, labels in (("bank", bank, bank_labels), ("query", queries, query_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
            raise ValueError(
                f"expected {name} features (N, D) and labels (N,) with N ≥ 1, got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if labels.min() < 0:
            raise ValueError(f"{name} labels must not be negative, got {int(labels.min())}")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank features have width {bank.shape[1]}, queries {queries.shape[1]}: not the same backbone")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and the temperature positive, got k={k}, temperature={temperature}")
