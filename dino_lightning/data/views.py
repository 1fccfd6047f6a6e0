"""From a source of images to what the loaders yield: training views, evaluation views, images with their paths."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2.functional import resized_crop

from dino_lightning.data.decode import UnreadableImage, as_array
from dino_lightning.data.geometry import center_view
from dino_lightning.data.multicrop import BOX, MultiCrop, crop_boxes
from dino_lightning.training.randomness import generator

log = logging.getLogger(__name__)

UNREADABLE = (UnreadableImage, OSError, SyntaxError)  # PIL raises a SyntaxError for some broken PNGs
_ATTEMPTS = 10
_REPLACEMENT = 2**32  # keeps the draws of a replacement apart from those of the views


class Unpainted(NamedTuple):
    """A batch of training views before the device paints them; global and local views apart, views-major.

    ``crops``: uint8 (2, B, C, H, W) and, if there are local views, (V, B, C, h, w). ``recipes``: to match, ``PAINT`` records
    (2, B) and (V, B) on the host. ``labels``: (B,), -1 where there is none. ``unreadable``: what could not be read, and why.
    """

    crops: list[Tensor]
    recipes: list[np.ndarray]
    labels: Tensor
    unreadable: list[str]


def load(source: Dataset, index: int, in_chans: int, reduction: Callable[[int, int], int] | None = None) -> tuple[np.ndarray, int]:
    """Image (H, W, C) of uint8 and label (-1 without) of a sample that is an image or (image, label, ...).

    A source that can (``ImageFolder``) reads it no larger than ``reduction`` asks for.
    """
    sample = source.reduced(index, reduction) if reduction and hasattr(source, "reduced") else source[index]
    image, *rest = sample if isinstance(sample, tuple | list) else (sample,)
    is_label = bool(rest) and np.ndim(rest[0]) == 0 and np.issubdtype(np.asarray(rest[0]).dtype, np.integer)
    return as_array(image, in_chans), int(rest[0]) if is_label else -1


def describe(source: Dataset, index: int) -> str:
    """A sample's path where its source tells that, else its number."""
    try:
        return source.path(index) if hasattr(source, "path") else f"sample {index}"
    except UNREADABLE:  # where the name lies with the image
        return f"sample {index}"


def _line(source: Dataset, index: int, error: Exception) -> str:
    return f"{describe(source, index)}: {getattr(error, 'reason', error)}"


class TrainingViews(Dataset):
    """(epoch, index) → crops, recipe, label and unreadable images, as a function of (seed, epoch, index) alone.

    Large JPEGs are read reduced if ``scaled_decoding`` (``MultiCrop.reduction``). An image that cannot be read is replaced by another one
    of the source, always the same for (seed, epoch, index).
    """

    def __init__(self, source: Dataset, multicrop: MultiCrop, in_chans: int, seed: int, scaled_decoding: bool) -> None:
        self.source, self.multicrop, self.in_chans, self.seed = source, multicrop, in_chans, seed
        self._reduction = multicrop.reduction if scaled_decoding else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[list[Tensor], np.ndarray, int, list[str]]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        (image, label), unreadable = self._load(epoch, index)
        crops, recipe = self.multicrop(image, self.seed, epoch, index)
        return crops, recipe, label, unreadable

    def _load(self, epoch: int, index: int) -> tuple[tuple[np.ndarray, int], list[str]]:
        unreadable: list[str] = []
        candidate = index
        for attempt in range(_ATTEMPTS):
            try:
                return load(self.source, candidate, self.in_chans, self._reduction), unreadable
            except UNREADABLE as error:
                unreadable.append(_line(self.source, candidate, error))
            candidate = int(generator(self.seed, epoch, index, _REPLACEMENT + attempt).integers(len(self)))
        raise RuntimeError(f"{_ATTEMPTS} images in a row could not be read:\n" + "\n".join(unreadable))


def collate_views(samples: Sequence[tuple]) -> Unpainted:
    """Samples of ``TrainingViews`` → one ``Unpainted`` batch."""
    crops, recipes, labels, unreadable = zip(*samples)
    n_views, batch = len(crops[0]), len(samples)
    groups = [range(2), range(2, n_views)] if n_views > 2 else [range(2)]
    by_view = np.stack(recipes, axis=1)  # (V, B)
    return Unpainted(
        # default_collate stacks straight into shared memory when it runs in a worker.
        [default_collate([c[v] for v in group for c in crops]).unflatten(0, (len(group), batch)) for group in groups],
        [by_view[group.start : group.stop] for group in groups],
        torch.tensor(labels),
        [line for lines in unreadable for line in lines],
    )


class EvaluationViews(Dataset):
    """index → centre view (C, h, w) of uint8 and label. An unreadable image is named in the log, and black with label -1."""

    def __init__(self, source: Dataset, size: tuple[int, int], in_chans: int) -> None:
        self.source, self.size, self.in_chans = source, size, in_chans

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = load(self.source, index, self.in_chans)
        except UNREADABLE as error:
            log.warning("left out, since it cannot be read: %s", _line(self.source, index, error))
            return torch.zeros(self.in_chans, *self.size, dtype=torch.uint8), -1
        return center_view(image, self.size), label


class CropViews(EvaluationViews):
    """(epoch, index) → a random crop (C, h, w) of uint8, flipped or not, and label; (seed, epoch, index) alone decides it.

    The training views of linear probes and fine-tuning: 8 to 100 % of the area, bilinear (paper, section 4.1). An unreadable
    image is named in the log, and black with label -1.
    """

    def __init__(self, source: Dataset, size: tuple[int, int], in_chans: int, seed: int) -> None:
        super().__init__(source, size, in_chans)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            image, label = load(self.source, index, self.in_chans)
        except UNREADABLE as error:
            log.warning("left out, since it cannot be read: %s", _line(self.source, index, error))
            return torch.zeros(self.in_chans, *self.size, dtype=torch.uint8), -1
        random = generator(self.seed, epoch, index)
        (box,) = crop_boxes(*image.shape[:2], [(0.08, 1.0)], random.random((1, BOX))).tolist()
        view = resized_crop(torch.from_numpy(image).permute(2, 0, 1), *box, list(self.size), antialias=True)
        return view.flip(-1) if random.random() < 0.5 else view, label


class PredictionViews(EvaluationViews):
    """index → centre view and path, or None for an unreadable image, which is named in the log."""

    def __getitem__(self, index: int) -> tuple[Tensor, str] | None:
        try:
            image, _ = load(self.source, index, self.in_chans)
        except UNREADABLE as error:
            log.warning("left out, since it cannot be read: %s", _line(self.source, index, error))
            return None
        return center_view(image, self.size), describe(self.source, index)

    def collate(self, samples: Sequence[tuple[Tensor, str] | None]) -> tuple[Tensor, list[str]]:
        """The readable samples of a batch: images (B, C, h, w) of uint8, possibly none, and their paths."""
        readable = [sample for sample in samples if sample is not None]
        if not readable:
            return torch.zeros(0, self.in_chans, *self.size, dtype=torch.uint8), []
        images, paths = zip(*readable)
        return default_collate(images), list(paths)
