"""Image files and whole folders of them as one Dataset."""

import os
from collections.abc import Collection, Sequence

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.data.decode import read_image
from dino_lightning.data.image_folder import pack_names
from dino_lightning.listing import list_named


class ImageFiles(Dataset):
    """The named image files and all images below the named folders, in this order, each image once.

    Item i is a uint8 array (H, W, in_chans).

    Args:
        names: of files and folders.
        in_chans: channels of the images.
        without: absolute paths of files that are no images, though their extension is that of one.

    Raises:
        FileNotFoundError: if a name is not there, a folder holds no images, or nothing is left.
    """

    def __init__(self, names: Sequence[str | os.PathLike[str]], in_chans: int = 3, without: Collection[str] = ()) -> None:
        self.in_chans = in_chans
        self._paths, self._ends = pack_names(list_named(names, without))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.path(index), self.in_chans)

    def path(self, index: int) -> str:
        """The absolute path of image ``index``."""
        index = range(len(self))[index]
        return os.fsdecode(self._paths[self._ends[index] : self._ends[index + 1]])
