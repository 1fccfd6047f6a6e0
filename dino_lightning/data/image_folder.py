"""A folder of images as a Dataset of uint8 arrays, with labels where its subfolders name classes."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.data.decode import read_image
from dino_lightning.listing import list_images


class ImageFolder(Dataset):
    """Every image below a folder, in the order of its relative path.

    Item i is (uint8 array (H, W, in_chans), label), the label an int or -1 for an image without a class. Hidden files
    and folders are skipped, linked folders are followed.

    The first-level subfolders are the classes if there are at least two and no image lies outside of them; with
    ``classes`` given (those of a training folder, for a query folder) the subfolders are looked up there instead.

    Raises FileNotFoundError or NotADirectoryError for a root that is no folder or holds no images, and ValueError for
    a subfolder that is not among the given ``classes``.
    """

    def __init__(self, root: str | os.PathLike[str], in_chans: int = 3, classes: Sequence[str] | None = None) -> None:
        self.root = os.path.abspath(root)
        self.in_chans = in_chans
        names = list_images(self.root)
        self.classes = list(classes) if classes is not None else _classes_among(names)
        self.labels = _labels(names, self.classes, self.root) if self.classes is not None else None
        self._names, self._ends = pack_names(names)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.reduced(index, None)

    def reduced(self, index: int, reduction: Callable[[int, int], int] | None) -> tuple[np.ndarray, int]:
        """Item ``index``, if it is a large JPEG reduced as far as ``reduction`` allows (``read_image``)."""
        label = -1 if self.labels is None else int(self.labels[index])
        return read_image(self.path(index), self.in_chans, reduction), label

    def path(self, index: int) -> str:
        """The absolute path of image ``index``."""
        index = range(len(self))[index]  # negative indices count from the end, and one too large is an IndexError
        return os.path.join(self.root, os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]]))


def _first_folder(name: str) -> str | None:
    first, slash, _ = name.partition("/")
    return first if slash else None


def _classes_among(names: list[str]) -> list[str] | None:
    folders = {_first_folder(name) for name in names}
    return sorted(folders) if None not in folders and len(folders) > 1 else None


def _labels(names: list[str], classes: list[str], root: str) -> np.ndarray:
    label_of = {name: label for label, name in enumerate(classes)}
    folders = [_first_folder(name) for name in names]
    for folder in dict.fromkeys(folders):
        if folder not in label_of:
            where = f"the folder {folder!r}" if folder else "an image outside of the class folders"
            raise ValueError(
                f"{root} holds {where}, and only these classes are known: {', '.join(classes)}. "
                f"Rename or move it, or train on data with this class."
            )
    return np.array([label_of[folder] for folder in folders], dtype=np.int64)


def pack_names(names: list[str]) -> tuple[bytes, np.ndarray]:
    """The names in one bytes object, and where they end: name i is [ends[i]:ends[i + 1]].

    DataLoader workers are forks that share the parent's memory until it is written to, and reading a Python object
    writes its reference count. A list of a million strings would so be copied into every worker, page by page; this
    is two objects. (A numpy array of strings would be, too, but as wide as its longest path at every place.)
    """
    encoded = [os.fsencode(name) for name in names]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return b"".join(encoded), ends
