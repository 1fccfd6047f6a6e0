"""A folder of features: ``features.npy``, ``paths.txt``, and ``features.json`` with what they are of.

Written in pieces, so that memory does not grow with the number of images, and an interruption costs seconds: the facts are
replaced last, and what lies in the other two files beyond them is cut off when the extraction goes on. Plain writes rather
than a memory map, with which a full disk ends the process without an error. Until all images are read, the header of
features.npy says that there are no rows: nobody takes a part for the whole.
"""

import io
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dino_lightning.finished import FACTS, FEATURES, PATHS

_SECONDS = 2.0  # between two times at which the files are brought to the disk
_WHENCE = ("checkpoint", "asked")  # the command; of what the features depend on, the other facts say more


class FeatureFolder:
    """Writes features to a folder, or goes on with it; a context that leaves a folder to go on with, also after an error.

    Args:
        folder: is made.
        facts: what the features depend on, to JSON; all but "checkpoint" and "asked" must be those that the folder was begun with.
        row_shape: of one image's features.

    Raises:
        FileExistsError: if the folder holds features of something else; its message names the differing facts.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: dict[str, Any], row_shape: tuple[int, ...]) -> None:
        self.folder, self.row_shape = Path(folder), row_shape
        self.rows = self.unreadable = 0
        self.complete = False
        self.facts = json.loads(json.dumps(facts))  # tuples become lists, as they are read
        if (self.folder / FACTS).is_file():
            self._resume()
        else:
            there = [name for name in (FEATURES, PATHS) if (self.folder / name).exists()]
            if there:
                raise FileExistsError(f"{folder} holds {there[0]} of something else (there is no {FACTS}); choose another folder")

    @property
    def done(self) -> int:
        """Images that were read or found unreadable."""
        return self.rows + self.unreadable

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save_facts()  # first: from now on the folder is known to be ours
        self._features, self._paths = (_open(self.folder / name) for name in (FEATURES, PATHS))
        header = _header(0, self.row_shape)
        self._features.write(header)
        _cut(self._features, len(header) + self.rows * 4 * int(np.prod(self.row_shape)))
        _cut(self._paths, sum(len(self._paths.readline()) for _ in range(self.rows)))
        self._committed = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        with self._features, self._paths:
            self._commit()

    def append(self, features: Tensor | None, paths: list[str], unreadable: int) -> None:
        """Adds features (b, ...) of b images, and counts those that could not be read."""
        if features is not None:
            self._features.write(features.float().cpu().contiguous().numpy().astype("<f4", copy=False))
        self._paths.write(b"".join(os.fsencode(path) + b"\n" for path in paths))
        self.rows += len(paths)
        self.unreadable += unreadable
        if time.monotonic() - self._committed >= _SECONDS:
            self._commit()

    def finish(self) -> None:
        """Tells features.npy how many rows it has. Nothing can be added afterwards."""
        self._features.seek(0)
        self._features.write(_header(self.rows, self.row_shape))
        self._features.seek(0, os.SEEK_END)
        self.complete = True

    def _commit(self) -> None:
        for file in (self._features, self._paths):
            file.flush()
            os.fsync(file.fileno())
        self._save_facts()
        self._committed = time.monotonic()

    def _save_facts(self) -> None:
        counts = {"features": self.rows, "unreadable": self.unreadable, "complete": self.complete}
        new = self.folder / f".{FACTS}.partial"
        with open(new, "w", encoding="utf-8") as file:
            json.dump({**self.facts, **counts}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / FACTS)

    def _resume(self) -> None:
        found = _read_facts(self.folder)
        self.rows, self.unreadable, self.complete = (found.pop(name) for name in ("features", "unreadable", "complete"))
        names = [name for name in {**found, **self.facts} if name not in _WHENCE and found.get(name) != self.facts.get(name)]
        if names:
            differences = "; ".join(f"{name} {found.get(name)} there, {self.facts.get(name)} here" for name in names)
            raise FileExistsError(f"{self.folder} holds features of something else ({differences}); choose another folder")
        self.facts = found
        needed = len(_header(0, self.row_shape)) + self.rows * 4 * int(np.prod(self.row_shape))
        if self.rows and (self.folder / FEATURES).stat().st_size < needed:
            raise ValueError(f"{self.folder / FEATURES} is shorter than {FACTS} says: it was changed; remove {self.folder}")


class Features(NamedTuple):
    """What a folder holds: features (N, ...) of float32, mapped from the disk; N paths; the facts."""

    features: Tensor
    paths: list[str]
    facts: dict[str, Any]


def read_features(folder: str | os.PathLike[str]) -> Features:
    """The class-token features (N, D) of ``dino-lightning extract``.

    Raises:
        FileNotFoundError: if the folder is none of them.
        ValueError: if the extraction was interrupted, the files do not fit, or the features are not one vector an image.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(f"{folder} has no {FACTS}: make the features with dino-lightning extract IMAGES --output {folder}")
    facts = _read_facts(folder)
    if not facts["complete"]:
        done = facts["features"] + facts["unreadable"]
        raise ValueError(
            f"the extraction in {folder} stopped after {done} of {facts['images']} images; the same dino-lightning extract "
            "again goes on with it"
        )
    if facts["what"] != "cls":
        raise ValueError(f"{folder} holds {facts['what']}; this needs the features of dino-lightning extract --what cls")
    features = np.load(folder / FEATURES, mmap_mode="c")  # torch warns of arrays that it may not write to
    paths = [os.fsdecode(line) for line in (folder / PATHS).read_bytes().split(b"\n")[:-1]]
    if not len(features) == len(paths) == facts["features"]:
        raise ValueError(
            f"{folder} was changed: {len(features)} rows in {FEATURES}, {len(paths)} in {PATHS}, and {FACTS} says "
            f"{facts['features']}; extract into another folder"
        )
    return Features(torch.from_numpy(features), paths, facts)


def _read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def _header(rows: int, row_shape: tuple[int, ...]) -> bytes:
    """Of a .npy file; numpy leaves room in it for the number of rows to grow, so that its length does not change."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, *row_shape)})
    return header.getvalue()


def _open(path: Path) -> BinaryIO:
    """For reading and writing, made if it is not there, at the beginning."""
    path.touch()
    return open(path, "r+b")


def _cut(file: BinaryIO, size: int) -> None:
    """Drops what lies behind ``size`` bytes, and goes there."""
    file.truncate(size)
    file.seek(size)
