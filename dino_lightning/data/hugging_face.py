"""Datasets of Hugging Face as a source of images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.data.decode import UnreadableImage, decode_image, read_image


class HuggingFaceImages(Dataset):
    """The images of one split; item i is (uint8 array (H, W, in_chans), label), -1 without labels.

    Read by index from memory-mapped Arrow files: order, crops, ranks and resuming are exact as for any Dataset. (What
    ``datasets`` streams has no index, and is not for training here.)

    Args:
        path: what ``datasets.load_dataset`` takes: a name on the hub, a folder, or ``parquet``, ``imagefolder``, ... with ``data_files``.
        name: of its configuration.
        split: of the dataset.
        data_files: for formats, files or patterns.
        image: column of the images.
        label: column of whole numbers; without it there are no labels.
        in_chans: channels of the images.

    Raises:
        ModuleNotFoundError: without ``datasets``.
        ValueError: if there is no such column, or it holds no images.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        data_files: str | Sequence[str] | Mapping[str, str] | None = None,
        image: str = "image",
        label: str | None = None,
        in_chans: int = 3,
    ) -> None:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("HuggingFaceImages needs datasets: pip install datasets", name="datasets") from error
        self.in_chans, self.image, self.label = in_chans, image, label
        rows = datasets.load_dataset(path, name, split=split, data_files=data_files)
        for column in filter(None, (image, label)):
            if column not in rows.features:
                raise ValueError(f"{path} has no column {column!r}, but {', '.join(rows.features)}")
        raw = datasets.Image(decode=False)
        try:
            rows = rows.select_columns([image, *([label] if label else [])]).cast_column(image, raw)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"the column {image!r} of {path} holds no images, but {rows.features[image]}") from error
        self.classes = getattr(rows.features[label], "names", None) if label else None
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.reduced(index, None)

    def reduced(self, index: int, reduction: Callable[[int, int], int] | None) -> tuple[np.ndarray, int]:
        """Item ``index``, if it is a large JPEG reduced as far as ``reduction`` allows (``read_image``)."""
        row: dict[str, Any] = self._rows[range(len(self))[index]]
        held, where = row[self.image] or {}, self.path(index, row)
        label = row[self.label] if self.label else None
        if held.get("bytes") is not None:
            image = decode_image(held["bytes"], where, self.in_chans, reduction)
        elif held.get("path"):
            image = read_image(held["path"], self.in_chans, reduction)
        else:
            raise UnreadableImage(where, "the row has no image")
        return image, -1 if label is None else int(label)

    def path(self, index: int, row: Mapping[str, Any] | None = None) -> str:
        """Its number, and the name that it had."""
        held = (row or self._rows[index])[self.image] or {}
        return f"row {index} ({held.get('path') or 'no name'})"
