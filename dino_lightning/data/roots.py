"""From a root, a folder of images or of shards or an address of shards, to Datasets."""

import os
from collections.abc import Sequence
from pathlib import Path

from dino_lightning.data.image_folder import ImageFolder
from dino_lightning.data.shards import Shards, is_shards
from dino_lightning.listing import is_address

Root = str | os.PathLike[str]
QUERIES = ("val", "validation", "test")


def open_images(root: Root, in_chans: int = 3, classes: Sequence[str] | None = None) -> ImageFolder | Shards:
    """The images there, with labels: ``len``, ``classes`` (None without), ``root`` and ``path(index)``.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as ``ImageFolder`` and ``Shards``.
    """
    return (Shards if is_shards(root) else ImageFolder)(root, in_chans, classes)


def find_splits(root: Root) -> tuple[Root, list[Root]]:
    """Where the training images and the queries are: those of val, validation and test that exist below ``root``.

    Without queries, ``root/train`` is the training folder only if it is alone: beside other folders it is one of them,
    and ``root`` itself is the training folder.
    """
    if is_address(root):
        if _holds_shards(root):
            return root, []
        below = str(root).rstrip("/")
        return f"{below}/train", [split for name in QUERIES if _holds_shards(split := f"{below}/{name}")]
    root = Path(root)
    queries: list[Root] = [root / name for name in QUERIES if (root / name).is_dir()]
    train = root / "train"
    if not train.is_dir():
        return root, []
    others = [entry for entry in root.iterdir() if entry != train and entry.is_dir() and not entry.name.startswith(".")]
    return (train, queries) if queries or not others else (root, [])


def split_name(root: Root) -> str:
    """``val`` of ``photos/val`` or ``s3://bucket/photos/val``."""
    return str(root).replace(os.sep, "/").rstrip("/").rpartition("/")[2]


def _holds_shards(address: Root) -> bool:
    """Each store has errors of its own for what is not there; others (no access, no network) go through."""
    try:
        Shards(address)
    except Exception as error:
        said = f"{type(error).__name__} {error}".lower()
        if any(words in said for words in ("filenotfound", "404", "nosuchkey", "not found", "notfound", "doesn't exist", "does not exist")):
            return False
        raise
    return True
