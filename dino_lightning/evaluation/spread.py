"""How widely features spread: 0 or 1 where a network has collapsed. Nothing here waits for the device but ``rank_me``."""

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over the samples of the L2-normalised features (N, D), as a share of the largest one: scalar in [0, 1].

    1 when they point into all directions, 0 when all are the same.
    """
    directions = F.normalize(features.float(), dim=1)
    return (1 - directions.mean(dim=0).square().sum()).clamp(min=0).sqrt()


def participation_ratio(features: Tensor) -> Tensor:
    """Effective rank tr(C)² / ‖C‖²_F of the covariance C of features (N, D): scalar in [1, min(N − 1, D)].

    0 if all features are the same. Computed without a decomposition, and of the N×N products where these are fewer.
    """
    centered = features.float() - features.float().mean(dim=0)
    products = centered @ centered.T if len(centered) < centered.shape[1] else centered.T @ centered
    return products.trace().square() / products.square().sum().clamp(min=1e-30)


def doubled(x: Tensor) -> Tensor:
    """In float64, on the host where the device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def rank_me(features: Tensor) -> float:
    """Effective rank exp(−Σ p ln p) of features (N, D), p their singular values over the sum (RankMe, Garrido et al. 2023, eq. 2)."""
    features = doubled(features)  # squares take twice the digits
    # The squares of the singular values are the eigenvalues of the smaller product: of (50,000, 2,048) features a hundredth of the work.
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-30) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def view_agreement(first: Tensor, second: Tensor) -> Tensor:
    """How much more alike two views of an image are than views of two images, features (N, D) of both views: scalar, at most 1.

    1 − (mean squared distance within pairs) / (between images), of L2-normalised features: 1 if the views of an image are the
    same, 0 if they are no more alike than those of two images.
    """
    a, b = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    within = (a - b).square().sum(dim=1).mean()
    n = len(a)
    together, pairs = a.sum(dim=0) @ b.sum(dim=0), (a * b).sum()
    between = 2 - 2 * (together - pairs) / max(1, n * (n - 1))
    return 1 - within / between.clamp(min=1e-12)
