"""Tar files of images as WebDataset's users have them, read in any order."""

import glob
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.data.decode import decode_image
from dino_lightning.data.image_folder import pack_names
from dino_lightning.data.slow_reads import watched
from dino_lightning.listing import IMAGE_EXTENSIONS

_OPEN = 64  # tar files at a time in a process


class Tars(Dataset):
    """Every image in some tar files of this machine, sorted by their names; item i is (uint8 array (H, W, in_chans), label).

    Of the files of one sample, which share a name up to its first dot, the image is the first one by its extension, the label the
    whole number in ``.cls``, -1 without. ``shard_ends`` says where the tar files part, so that a sampler can draw each as a whole:
    what lies in one should be a mixture, as a batch is. All headers are read once at the start.

    Args:
        files: names, or one pattern such as ``tars/train-*.tar``.
        in_chans: channels of the images.

    Raises:
        FileNotFoundError: if there are none, or no images in them.
        ValueError: if one is compressed, cut off, or no tar file.
    """

    def __init__(self, files: str | Sequence[str], in_chans: int = 3) -> None:
        self.in_chans = in_chans
        self.files = sorted(glob.glob(files, recursive=True)) if isinstance(files, str) else list(files)
        names: list[str] = []
        places: list[tuple[int, int, int, int]] = []  # file, offset, bytes, label
        ends = [0]
        for number, file in enumerate(self.files):
            for name, offset, size, label in _images_in(file):
                names.append(name)
                places.append((number, offset, size, label))
            ends.append(len(names))
        if not names:
            raise FileNotFoundError(f"no images in {len(self.files)} tar files {files!r}: check the pattern")
        self._places = np.array(places, np.int64)  # an array is not copied into the workers, page by page, as a list would be
        self._names, self._ends = pack_names(names)
        self.shard_ends = np.array(ends)
        self._streams: OrderedDict[int, int] = OrderedDict()  # file descriptors
        self._of_process = os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.reduced(index, None)

    def reduced(self, index: int, reduction: Callable[[int, int], int] | None) -> tuple[np.ndarray, int]:
        """Item ``index``, if it is a large JPEG reduced as far as ``reduction`` allows (``read_image``)."""
        number, offset, size, label = self._places[index].tolist()
        name = self.path(index)
        with watched(name):
            return decode_image(os.pread(self._descriptor(number), size, offset), name, self.in_chans, reduction), label

    def path(self, index: int) -> str:
        """Of the tar file, and of the image in it."""
        index = range(len(self))[index]
        name = os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])
        return f"{self.files[self._places[index, 0]]}/{name}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_streams": OrderedDict()}

    def _descriptor(self, number: int) -> int:
        if self._of_process != os.getpid():  # descriptors of a parent are its own to close
            self._streams, self._of_process = OrderedDict(), os.getpid()
        if number not in self._streams:
            if len(self._streams) == _OPEN:
                os.close(self._streams.popitem(last=False)[1])
            self._streams[number] = os.open(self.files[number], os.O_RDONLY)
        self._streams.move_to_end(number)
        return self._streams[number]


def _images_in(file: str) -> list[tuple[str, int, int, int]]:
    """(name, offset, bytes, label) of the images in a tar file, sorted by name."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                key, extension = folder + slash + name.partition(".")[0], os.path.splitext(name)[1].lower()
                if not member.isfile() or name.startswith("."):
                    continue
                if extension == ".cls":
                    labels[key] = int(tar.extractfile(member).read())
                elif extension in IMAGE_EXTENSIONS and member.name < images.get(key, ("\U0010ffff",))[0]:
                    images[key] = member.name, member.offset_data, member.size
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is no plain, whole tar file of samples ({error}); unpack a compressed one to .tar first") from error
    if (last := max((offset + size for _, offset, size in images.values()), default=0)) > os.path.getsize(file):
        raise ValueError(f"{file} is cut off: it has {os.path.getsize(file)} bytes of at least {last}; copy it again")
    return [(*images[key], labels.get(key, -1)) for key in sorted(images)]
