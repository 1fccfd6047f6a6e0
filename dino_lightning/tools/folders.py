"""Where the tools find labelled images."""

from pathlib import Path

from dino_lightning.data import ImageFolder, Shards, find_splits, open_images
from dino_lightning.data.roots import QUERIES, split_name
from dino_lightning.listing import is_address


def labelled_folders(root: str, queries: str | None, in_chans: int) -> tuple[ImageFolder | Shards, ImageFolder | Shards]:
    """``root/train`` and the folder of queries, ``root/QUERIES`` or the first of val, validation and test that there is.

    Raises:
        FileNotFoundError: if one of them is missing.
        ValueError: if train/ has no class folders, or the queries have other ones.
    """
    if is_address(root):
        below, splits = find_splits(root)
        found = next((split for split in splits if queries in (None, split_name(split))), None)
    else:
        below = Path(root) / "train"
        names = [queries] if queries else QUERIES
        found = next((Path(root) / name for name in names if (Path(root) / name).is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"there is no folder of queries in {root}; looked for {queries or ', '.join(QUERIES)}")
    train = open_images(below, in_chans)
    if train.classes is None:
        raise ValueError(f"{train.root} has no class folders, whose names are the labels; make one for each class")
    return train, open_images(found, in_chans, train.classes)
