"""Features of data sets: of a network, and of the raw pixels to compare with."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, channel_numbers, normalize
from dino_lightning.data.views import EvaluationViews, PredictionViews
from dino_lightning.data.workers import loader


@torch.no_grad()
def extract_features(
    network: Callable[[Tensor], Tensor],
    source: Dataset,
    *,
    size: tuple[int, int],
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of all samples of ``source``, on the device.

    Args:
        network: images (B, C, H, W), normalised, → features (B, D).
        source: yields images or (image, label, ...); labels are -1 where there are none.
        size: (H, W) of the centre view: resized to 256/224 of it, then cropped.
        mean: per channel, in [0, 1], as in the training; by default ImageNet's, or 0.5 for other channel counts.
        std: likewise.
        progress: title of a progress bar; None for none.
    """
    mean = channel_numbers("mean", mean, IMAGENET_MEAN, in_chans)
    std = channel_numbers("std", std, IMAGENET_STD, in_chans)
    batches = loader(EvaluationViews(source, size, in_chans), batch_size, num_workers)
    features, labels = [], []
    for images, label in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        features.append(network(normalize(images.to(device), mean, std)))
        labels.append(label.to(device))
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def features_with_paths(
    network: Callable[[Tensor], Tensor],
    source: Dataset,
    *,
    size: tuple[int, int],
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    start: int = 0,
) -> Iterator[tuple[Tensor | None, list[str]]]:
    """Of each batch of ``source`` in order, the features (b, ...) of its readable images, on the device, and their b paths.

    Without any readable image the features are None. The log names the unreadable ones.

    Args:
        network: images (B, C, H, W), normalised, → features (B, ...).
        source: yields images; ``source.path(i)`` names them.
        size: (H, W) of the centre view, as in ``extract_features``.
        start: index of the first image.
    """
    views = PredictionViews(source, size, in_chans)
    batches = loader(views, batch_size, num_workers, sampler=range(start, len(views)), collate_fn=views.collate)
    for images, paths in batches:
        yield network(normalize(images.to(device), mean, std)) if paths else None, paths


def raw_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) → their pixels at 32×32, (B, C·1024): what features must beat."""
    return F.interpolate(images, (32, 32), mode="bilinear", antialias=True).flatten(1)
