"""Checkpoints that are whole or not there, whenever the process or the machine goes down."""

import glob
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, makes sure it is on the disk, and then renames it over the old one.

    Until the rename the earlier checkpoint of that name is untouched; a write that fails leaves nothing behind, a process killed
    while writing a hidden ``.NAME.*.partial``, which the next write of that name removes. Lightning's own writes through the system's temporary folder, whose move to
    another disk is a copy, and does not wait for the disk. Addresses (s3://...) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            left.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False) as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        _sync_folder(path.parent)


def _umask() -> int:
    """Temporary files are readable by their owner alone; checkpoints as other files are."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes the rename last; on Windows folders cannot be opened, and renames need no such help."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
