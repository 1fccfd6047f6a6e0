"""MultiCropDataModule: images in, painted views out; labelled images for the monitors; images with paths for prediction."""

import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dino_lightning.backbones.positions import height_width
from dino_lightning.data.multicrop import MultiCrop
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, channel_numbers, normalize, paint
from dino_lightning.data.roots import Root, find_splits, open_images, split_name
from dino_lightning.data.sampler import training_sampler
from dino_lightning.data.shards import is_shards
from dino_lightning.data.streams import SideStream
from dino_lightning.data.unreadable import UnreadableLedger
from dino_lightning.data.views import EvaluationViews, PredictionViews, TrainingViews, Unpainted, collate_views
from dino_lightning.data.workers import cores, loader
from dino_lightning.listing import is_address
from dino_lightning.training.randomness import generator

log = logging.getLogger(__name__)


class MultiCropDataModule(LightningDataModule):
    """Views for DINO from a folder of images or any map-style Dataset.

    The workers read, crop and decide; the device paints (colour jitter, blur, solarization), in on_after_batch_transfer.
    What an image becomes depends on the seed, the epoch and its index alone, not on workers or ranks.

    Training batches are (views, labels): a list of tensors (B, C, H, W), two global then the local ones, and (B,)
    labels, -1 where there are none; DINO does not use them. (Without a Trainer, ``on_after_batch_transfer(batch, 0)``
    makes that of what the loader yields.)

    Args:
        root: folder of images, flat or nested, with or without class folders; or of shards (``dino-lightning shard``), or the address of
            such a folder. If it has train/ and val/, validation/ or test/, the first is trained on, and the first labelled one of the
            others holds the queries of the monitors.
        dataset: instead of root, a map-style Dataset that yields an image or (image, label, ...); an image is a PIL image, a
            tensor (C, H, W) or an array (H, W, C).
        batch_size: images per device in a batch.
        num_workers: worker processes per device; by default one for each CPU core this process may use, at most 16.
        global_crops_size: pixels of the two global crops, int or (H, W).
        global_crops_scale: least and largest share of the image's area in a global crop.
        local_crops_number: local crops per image.
        local_crops_size: pixels of the local crops, int or (H, W).
        local_crops_scale: least and largest share of the image's area in a local crop.
        color_jitter: strengths of brightness, contrast, saturation and hue.
        jitter_p: probability of the colour jitter.
        grayscale_p: probability of grayscale.
        blur_p: probability of a Gaussian blur in the first global, the second global, and a local crop.
        blur_sigma: least and largest standard deviation of the blur, in pixels.
        solarize_p: probability of solarization in the second global crop.
        hflip_p: probability of a left-right flip.
        vflip_p: probability of an upside-down flip, for images without an up, such as satellite and microscopy ones.
        in_chans: channels; other than 3, only brightness, contrast, blur and flips are applied.
        mean: per channel, in [0, 1]; by default ImageNet's, or 0.5 for other channel counts.
        std: per channel, in [0, 1]; by default ImageNet's, or 0.5 for other channel counts.
        seed: of order and augmentation; by default that of seed_everything, or 0.
        max_unreadable: largest share of the images that may be unreadable in an epoch before the run stops. An unreadable
            image is replaced by another one and named in the log.
        max_bank: largest number of labelled training images that the monitors compare with.
        scaled_decoding: read JPEGs of a folder from about 2 megapixels on (with the default crops) reduced by 2, 4 or 8, as far as every
            crop still shrinks by 1.5: five times faster for 12 megapixels, and crops change by 0.3 of 255 levels on average.

    Attributes:
        batch_came: when the last batch had been waited for (``time.perf_counter``), and was about to be moved and painted; None before.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        dataset: Dataset | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        global_crops_size: int | tuple[int, int] = 224,
        global_crops_scale: tuple[float, float] = (0.4, 1.0),
        local_crops_number: int = 8,
        local_crops_size: int | tuple[int, int] = 96,
        local_crops_scale: tuple[float, float] = (0.05, 0.4),
        color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_p: float = 0.8,
        grayscale_p: float = 0.2,
        blur_p: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize_p: float = 0.2,
        hflip_p: float = 0.5,
        vflip_p: float = 0.0,
        in_chans: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int | None = None,
        max_unreadable: float = 0.01,
        max_bank: int = 50_000,
        scaled_decoding: bool = True,
    ) -> None:
        super().__init__()
        if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(f"dataset must have a length and be indexed (map-style), got {type(dataset).__name__}")
        if (root is None) == (dataset is None):
            raise ValueError(f"give either root or dataset, got root={root!r} and dataset={dataset!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.root: Root | None = root if root is None or is_address(root) else Path(root).expanduser()
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = _default_workers() if num_workers is None else num_workers
        self.in_chans = in_chans
        self.mean = channel_numbers("mean", mean, IMAGENET_MEAN, in_chans)
        self.std = channel_numbers("std", std, IMAGENET_STD, in_chans)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"max_unreadable is a share of the images in [0, 1], got {max_unreadable}")
        self.multicrop = MultiCrop(
            global_crops_size=_pair("global_crops_size", global_crops_size),
            global_crops_scale=tuple(global_crops_scale),
            local_crops_number=local_crops_number,
            local_crops_size=_pair("local_crops_size", local_crops_size),
            local_crops_scale=tuple(local_crops_scale),
            color_jitter=tuple(color_jitter),
            jitter_p=jitter_p,
            grayscale_p=grayscale_p,
            blur_p=tuple(blur_p),
            blur_sigma=tuple(blur_sigma),
            solarize_p=solarize_p,
            hflip_p=hflip_p,
            vflip_p=vflip_p,
        )
        self.max_bank = max_bank
        self.scaled_decoding = scaled_decoding
        self._train_source: Dataset | None = None
        self._query_folders: list[Root] = []
        self._unreadable = UnreadableLedger(max_unreadable)
        self._side = SideStream()
        self.batch_came: float | None = None

    def setup(self, stage: str) -> None:
        """Lists the images. Raises for a folder without images, or fewer of them than a batch over all devices holds."""
        if stage == "predict":
            return
        if self._train_source is None:
            if self.root is None:
                self._train_source = self.dataset
            else:
                train, self._query_folders = find_splits(self.root)
                self._train_source = open_images(train, self.in_chans)
        # Without labelled splits there is nothing to validate, and that is fine.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        if stage == "fit":
            needed = self.batch_size * self._world_size
            if len(self._train_source) < needed:
                raise ValueError(
                    f"{len(self._train_source)} images are fewer than one batch: batch_size={self.batch_size} on "
                    f"{self._world_size} device(s) needs {needed}; lower it (--data.batch_size), or use --config auto, which does"
                )

    def train_dataloader(self) -> DataLoader:
        most = len(self._train_source) // self._world_size
        if self.batch_size > most:  # setup refuses that, but Lightning's BatchSizeFinder doubles the batch after it
            log.warning("batch_size=%d is more than the %d images per device; it is set to that", self.batch_size, most)
            self.batch_size = most
        return self._loader(
            TrainingViews(self._train_source, self.multicrop, self.in_chans, self.seed, self.scaled_decoding),
            drop_last=True,
            collate_fn=collate_views,
            sampler=training_sampler(self._train_source, self.batch_size, self.seed, self.trainer),
        )

    def val_dataloader(self) -> list[DataLoader]:
        """[bank, query] of labelled images, the queries from val/ or else validation/ or test/; nothing without them."""
        return self._labelled_loaders(self._query_folders)

    def test_dataloader(self) -> list[DataLoader]:
        """[bank, query] of labelled images, the queries from test/ if there is one."""
        return self._labelled_loaders(sorted(self._query_folders, key=lambda folder: split_name(folder) != "test"))

    def predict_dataloader(self) -> DataLoader:
        """All images below the root, or of the dataset, with their paths."""
        source = self.dataset if self.root is None else self._all_images()
        views = PredictionViews(source, self.multicrop.global_crops_size, self.in_chans)
        return self._loader(views, collate_fn=views.collate)

    def _all_images(self) -> Dataset:
        below, queries = find_splits(self.root)
        if queries and is_shards(below):
            raise ValueError(f"{self.root} holds shards of several splits; give one of them, such as {below}")
        return open_images(self.root, self.in_chans)

    def examples(self, count: int) -> Tensor:
        """Images to look at during training, always the same: centre views (count, C, H, W) of uint8, evenly spaced.

        Of the monitors' queries where there are any, else of the training images; none if a subclass has others.
        """
        size = self.multicrop.global_crops_size
        if self._train_source is None:
            return torch.zeros(0, self.in_chans, *size, dtype=torch.uint8)
        loaders = self._labelled_loaders(self._query_folders)
        views = loaders[1].dataset if loaders else EvaluationViews(self._train_source, size, self.in_chans)
        count = min(count, len(views))
        return torch.stack([_seen(views, i * len(views) // count) for i in range(count)])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.batch_came = time.perf_counter()
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copied, and training views painted, on a GPU beside the step under way."""
        if not isinstance(batch, Unpainted):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        with self._side.on(device):
            batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
            views, labels = self._painted(batch)
        self._side.hand_over([*views, labels])
        return views, labels

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Unpainted):
            return self._painted(batch)
        if isinstance(batch, list | tuple) and isinstance(batch[0], Tensor) and batch[0].dtype == torch.uint8:
            return self._in_precision(normalize(batch[0], self.mean, self.std)), *batch[1:]
        return batch

    def _painted(self, batch: Unpainted) -> tuple[list[Tensor], Tensor]:
        if self.trainer is not None:
            self._unreadable.note(self.trainer, batch)
        return self._in_precision(self.paint(batch)), batch.labels

    def _in_precision(self, images: Any) -> Any:
        """What was painted here, in the type that Trainer(precision="64-true") gives to what loaders yield; else as it is."""
        return images if self.trainer is None else self.trainer.precision_plugin.convert_input(images)

    def paint(self, batch: Unpainted) -> list[Tensor]:
        """The views of a batch, painted and normalised on the device they are on: V tensors (B, C, H, W)."""
        views: list[Tensor] = []
        for crops, recipe in zip(batch.crops, batch.recipes):
            painted = paint(crops.flatten(0, 1), recipe.reshape(-1), self.mean, self.std)
            views += painted.chunk(len(crops))
        return views

    @property
    def classes(self) -> list[str] | None:
        """Names of the training labels 0, 1, ..., where the images have any and ``setup`` was called."""
        return getattr(self._train_source, "classes", None)

    @property
    def query_folders(self) -> list[Root]:
        """Folders of labelled queries, the first of which validation takes; known after ``setup``."""
        return list(self._query_folders)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _labelled_loaders(self, query_folders: Sequence[Root]) -> list[DataLoader]:
        bank = self._train_source
        for folder in query_folders if self.classes else []:
            try:
                queries = open_images(folder, self.in_chans, self.classes)
            except (ValueError, FileNotFoundError) as error:
                log.warning("%s is not monitored: %s", folder, error)
                continue
            if len(bank) > self.max_bank:  # always the same images, of all classes
                bank = Subset(bank, np.sort(generator(0).permutation(len(bank))[: self.max_bank]).tolist())
            size = self.multicrop.global_crops_size
            return [self._loader(EvaluationViews(source, size, self.in_chans)) for source in (bank, queries)]
        return []

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        return loader(dataset, self.batch_size, self.num_workers, **options)


def _seen(views: EvaluationViews, index: int) -> Tensor:
    """The view of this image, or of the next one that is not black, as unreadable ones are."""
    shown = (views[(index + later) % len(views)][0] for later in range(min(10, len(views))))
    first = next(shown)
    return first if first.any() else next((view for view in shown if view.any()), first)


def _default_workers() -> int:
    return max(1, min(16, cores() // max(1, torch.cuda.device_count())))


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    try:
        return height_width(size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
