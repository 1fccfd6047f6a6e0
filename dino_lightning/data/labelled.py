"""Labelled data to train classifiers on: images, or features that were extracted once."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, channel_numbers, normalize
from dino_lightning.data.sampler import training_sampler
from dino_lightning.data.views import CropViews, EvaluationViews
from dino_lightning.data.workers import loader


class LabelledDataModule(LightningDataModule):
    """(images (B, C, H, W), labels (B,)): random crops, flipped or not, of the training images, centre views of the queries.

    What an image becomes depends on the seed, the epoch and its index alone. An unreadable one is named in the log and has
    label -1, as what has no label.

    Args:
        train: yields (image, label), for example a ``data.ImageFolder``.
        queries: to validate with, likewise.
        size: (H, W) in pixels.
        in_chans: channels of the images.
        batch_size: images per device in a batch.
        num_workers: worker processes.
        mean: per channel, in [0, 1], as in the training of the backbone; by default ImageNet's, or 0.5 for other channel counts.
        std: likewise.
        seed: of order and crops.
    """

    def __init__(
        self,
        train: Dataset,
        queries: Dataset,
        size: tuple[int, int],
        in_chans: int = 3,
        batch_size: int = 128,
        num_workers: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.mean = channel_numbers("mean", mean, IMAGENET_MEAN, in_chans)
        self.std = channel_numbers("std", std, IMAGENET_STD, in_chans)
        self._source = train
        self._train = CropViews(train, size, in_chans, seed)
        self._queries = EvaluationViews(queries, size, in_chans)

    def train_dataloader(self) -> DataLoader:
        sampler = training_sampler(self._source, self.batch_size, self.seed, self.trainer)
        return loader(self._train, self.batch_size, self.num_workers, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return loader(self._queries, self.batch_size, self.num_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        images = normalize(images, self.mean, self.std)
        return images if self.trainer is None else self.trainer.precision_plugin.convert_input(images), labels


class CachedFeatures(Dataset):
    """Features (N, F) and labels (N,) as a Dataset whose batches are taken out at once: ``loader`` makes them."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.features[indices], self.labels[indices]

    def loader(self, batch_size: int, shuffle: bool = False, seed: int = 0) -> DataLoader:
        """Batches (features (B, F), labels (B,)), in an order that depends on the seed."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size, shuffle=shuffle, generator=order, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
