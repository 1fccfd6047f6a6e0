"""A folder of images as a Dataset of uint8 arrays, with labels where its subfolders name classes."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.datasets.decode import read_image

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .pbm .jp2 .npy".split()
)  # lower case; file names are matched in any case


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
        names = _list_images(self.root)
        self.classes = list(classes) if classes is not None else _classes_among(names)
        self.labels = _labels(names, self.classes, self.root) if self.classes is not None else None
        self._names, self._ends = pack_names(names)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label = -1 if self.labels is None else int(self.labels[index])
        return read_image(self.path(index), self.in_chans), label

    def path(self, index: int) -> str:
        """The absolute path of image ``index``."""
        index = range(len(self))[index]  # negative indices count from the end, and one too large is an IndexError
        return os.path.join(self.root, os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]]))


def find_splits(root: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """The training folder and the folders with queries below ``root``: those of val, validation and test that exist.

    Without queries, ``root/train`` is the training folder only if it is alone: beside other folders it is one of them,
    and ``root`` itself is the training folder.
    """
    root = Path(root)
    queries = [root / name for name in ("val", "validation", "test") if (root / name).is_dir()]
    train = root / "train"
    if not train.is_dir():
        return root, []
    others = [entry for entry in root.iterdir() if entry != train and entry.is_dir() and not entry.name.startswith(".")]
    return (train, queries) if queries or not others else (root, [])


@dataclass
class _Listing:
    images: list[str] = field(default_factory=list)  # relative to the root, with "/" between the parts
    other_extensions: Counter[str] = field(default_factory=Counter)
    folders: int = 0  # below the root


def _list_images(root: str) -> list[str]:
    if not os.path.exists(root):
        raise FileNotFoundError(f"there is no image folder {root}: check the path")
    if not os.path.isdir(root):
        raise NotADirectoryError(f"{root} is a file: pass the folder that holds the images")
    listing = _scan(root)
    if not listing.images:
        raise FileNotFoundError(_no_images(root, listing))
    # A folder lists its entries in no order; code points compare alike on every machine, whatever its locale.
    return sorted(listing.images)


def _scan(root: str) -> _Listing:
    listing = _Listing(folders=-1)  # the root itself does not count
    pending = [(root, "", frozenset())]
    while pending:
        folder, prefix, parents = pending.pop()
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in parents:  # a link back to a folder that this one lies in
            continue
        listing.folders += 1
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    pending.append((entry.path, f"{prefix}{entry.name}/", parents | {identity}))
                    continue
                extension = os.path.splitext(entry.name)[1].lower()
                if extension in IMAGE_EXTENSIONS:
                    listing.images.append(prefix + entry.name)
                else:
                    listing.other_extensions[extension] += 1
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # entry.is_dir() alone raises for a link to itself; isdir takes it for a file, which will not open when it is read.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _no_images(root: str, listing: _Listing) -> str:
    others = listing.other_extensions
    frequent = ", ".join(f"{name or 'no extension'} ({count})" for name, count in others.most_common(3))
    return (
        f"no images in {root}: found {listing.folders} folders and {others.total()} other files"
        f"{f', most of them {frequent}' if frequent else ''}. Files count as images by their extension: "
        f"{' '.join(sorted(IMAGE_EXTENSIONS))}. Convert the files to one of these, or pass another folder."
    )


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
