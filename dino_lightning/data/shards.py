"""Shards: the images of a folder in few large files, as ``dino-lightning shard`` writes them and Lightning's litdata reads them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.data.decode import decode_image
from dino_lightning.data.slow_reads import watched
from dino_lightning.listing import is_address

INDEX = "index.json"  # litdata's, in which ours stand under this key:
FACTS = "dino_lightning"
_FORMATS = ("int", "no_header_numpy")  # of litdata, for a sample's label and for its image and name


class Shards(Dataset):
    """Every image of a folder of shards; item i is (uint8 array (H, W, in_chans), label), as of the ``ImageFolder`` they were made of.

    They lie in a random order that never changes. ``shard_ends`` says where they part, so that a sampler can draw each shard as a whole.

    Args:
        root: a folder, or any address that litdata takes (``s3://bucket/shards``, ``gs://...``). Credentials are where its libraries
            look for them, in the environment or in files of their own, not in a configuration.
        in_chans: channels of the images.
        classes: those of a training set, for queries of the same ones.
        cache: folder for what comes from an address; by default litdata's.
        max_cache_size: such as "200GB", of all processes of a machine; shards that were read go first. By default litdata's.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if litdata did not get them from ``dino-lightning shard``, one of them is missing or cut off, or a class is not among
            the given ``classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        in_chans: int = 3,
        classes: Sequence[str] | None = None,
        cache: str | None = None,
        max_cache_size: str | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.in_chans = in_chans
        self._options = {"cache_dir": cache, "max_cache_size": max_cache_size}
        self._stream: Any = None
        self._of_process: int | None = None
        index = self._index()
        own = index[FACTS]["classes"]
        if classes is not None and own is not None and not set(own) <= set(classes):
            raise ValueError(f"{self.root} has the classes {', '.join(own)}, and only these are known: {', '.join(classes)}")
        self.classes = list(classes) if classes is not None else own
        known = {name: label for label, name in enumerate(self.classes or [])}
        self._labels = [known[name] for name in own or []]  # by the labels in the shards
        self.shard_ends = np.cumsum([0, *(chunk["chunk_size"] for chunk in index["chunks"])])

    def __len__(self) -> int:
        return int(self.shard_ends[-1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.reduced(index, None)

    def reduced(self, index: int, reduction: Callable[[int, int], int] | None) -> tuple[np.ndarray, int]:
        """Item ``index``, if it is a large JPEG reduced as far as ``reduction`` allows (``read_image``)."""
        sample = self._sample(index)
        label = int(sample["label"])
        name = f"{self.root}/{_text(sample['name'])}"
        return decode_image(sample["image"].tobytes(), name, self.in_chans, reduction), self._labels[label] if self._labels else -1

    def path(self, index: int) -> str:
        """Where image ``index`` lay below the folder that the shards were made of, behind their own root."""
        return f"{self.root}/{_text(self._sample(index)['name'])}"

    def _sample(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        if self._of_process != os.getpid():  # litdata's threads do not live on in a fork
            self._stream, self._of_process = self._open(), os.getpid()
            if is_address(self.root):
                self._stream[index]  # makes its cache
                self._stream.on_demand_bytes = False  # whole shards are fetched, not image by image
        with watched(f"{self.root}, image {index}"):
            return self._stream[index]

    def _open(self) -> Any:
        # Decoded by windows, it would read 256 samples for each one.
        return import_litdata().StreamingDataset(self.root, shuffle=False, batch_decode=0, **self._options)

    def _index(self) -> dict[str, Any]:
        """Of litdata, with ours, both checked."""
        if is_address(self.root):
            stream = self._open()
            stream.cache = stream._create_cache(worker_env=None)  # fetches the index, and no shard yet
            index = json.loads((Path(stream.cache._reader.config._cache_dir) / INDEX).read_text(encoding="utf-8"))
            _check(index, self.root)
            return index
        folder = Path(self.root)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"there are no shards in {folder}: no {INDEX}; dino-lightning shard writes them")
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        _check(index, self.root)
        for chunk in index["chunks"]:
            file = folder / chunk["filename"]
            size = file.stat().st_size if file.is_file() else 0
            expected = index[FACTS].get("bytes", {}).get(file.name, size)
            if not size or size != expected:
                raise ValueError(
                    f"the shard {file} has {size} bytes instead of {expected}: copy the folder again (SHA256SUMS tells what is whole)"
                )
        return index


def _check(index: Any, root: str) -> None:
    """That ``dino-lightning shard`` wrote this index: litdata would also read samples by pickle, and files wherever they are named."""
    try:
        config, files = index["config"], [chunk["filename"] for chunk in index["chunks"]]
        is_ours = FACTS in index and not config["compression"] and not config["encryption"]
        is_ours = is_ours and all(name.partition(":")[0] in _FORMATS for name in config["data_format"])
        is_ours = is_ours and all(isinstance(file, str) and os.path.basename(file) == file and file.endswith(".bin") for file in files)
    except (KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{root} holds samples of another kind; make shards of the images with dino-lightning shard")


def import_litdata() -> ModuleType:
    """litdata, or an error that says how to install it."""
    try:
        import litdata
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("shards need litdata: pip install litdata", name="litdata") from error
    return litdata


def is_shards(root: str | os.PathLike[str]) -> bool:
    """Whether images lie there in shards: at an address always, in a folder if there is an index of litdata's."""
    if is_address(root):
        return True
    try:
        index = json.loads((Path(root) / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and {"chunks", "config"} <= index.keys()


def _text(name: np.ndarray) -> str:
    return os.fsdecode(name.tobytes())
