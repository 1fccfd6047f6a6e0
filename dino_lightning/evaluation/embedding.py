"""Features as points in a plane, for people to look at."""

import importlib.util

import torch
from torch import Tensor

from dino_lightning.evaluation.neighbors import normalized


def plane_pca(features: Tensor) -> Tensor:
    """The first two principal components (N, 2) of the L2-normalised features (N, D), on the host.

    Their sign is that with which the entry of greatest size in the component's direction is positive.

    Raises:
        ValueError: for none, or if a number is not finite.
    """
    points = normalized(features).cpu().double()
    points = points - points.mean(dim=0)
    _, _, directions = torch.linalg.svd(points if len(points) < points.shape[1] else points.T @ points, full_matrices=False)
    axes = directions[:2]
    signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    flat = points @ (axes * signs).T
    return torch.nn.functional.pad(flat, (0, 2 - flat.shape[1])).float()


def has_umap() -> bool:
    """Whether umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def plane_umap(features: Tensor, seed: int = 0) -> Tensor:
    """UMAP of the features (N, D) by their cosine: (N, 2), neighbours kept beside each other (McInnes et al. 2018).

    Raises:
        ModuleNotFoundError: without umap-learn (``pip install umap-learn``).
        ValueError: for none, or if a number is not finite.
    """
    from umap import UMAP  # pyright: ignore[reportMissingImports]  an extra that CI does without

    points = normalized(features).cpu().numpy()
    layout = UMAP(metric="cosine", random_state=seed, n_jobs=1, n_neighbors=min(15, len(points) - 1))
    return torch.from_numpy(layout.fit_transform(points)).float()
