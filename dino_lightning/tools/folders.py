"""Where the tools find labelled images."""

from pathlib import Path

from dino_lightning.data import ImageFolder, Shards, find_splits, open_images
from dino_lightning.data.roots import split_name
from dino_lightning.listing import is_address


def labelled_folders(root: str, queries: str | None, in_chans: int) -> tuple[ImageFolder | Shards, ImageFolder | Shards]:
    """``root/train`` and the folder of queries, ``root/QUERIES`` or the first of val, validation and test that there is.

    Raises:
        FileNotFoundError: if one of them is missing.
        ValueError: if train/ has no class folders, or the queries have other ones.
    """
    if is_address(root):
        below, found = find_splits(root)
        query = next((split for split in found if queries in (None, split_name(split))), None)
        if query is None:
            raise FileNotFoundError(f"there are no shards of queries at {root}; looked for {queries or 'val, validation, test'}")
        train = open_images(below, in_chans)
        return train, open_images(query, in_chans, train.classes)
    names = [queries] if queries else ["val", "validation", "test"]
    folder = next((Path(root) / name for name in names if (Path(root) / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"there is no folder of queries in {root}; looked for {', '.join(names)}")
    train = open_images(Path(root) / "train", in_chans)
    if train.classes is None:
        raise ValueError(f"{train.root} has no class folders, whose names are the labels; make one for each class")
    return train, open_images(folder, in_chans, train.classes)
