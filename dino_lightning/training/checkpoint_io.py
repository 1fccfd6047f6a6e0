"""Checkpoints that are whole or not there, whenever the process or the machine goes down."""

import errno
import glob
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

_HOST = re.sub(r"\W", "-", platform.node())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, makes sure it is on the disk, and then renames it over the old one.

    Until the rename the earlier checkpoint of that name is untouched; a write that fails leaves nothing behind, a process killed
    while writing a hidden ``.NAME.PID@HOST.*.partial``, which the next start removes. Lightning's own writes through the system's
    temporary folder, whose move to another disk is a copy, and does not wait for the disk. Addresses (s3://...) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.{os.getpid()}@{_HOST}.", suffix=".partial", delete=False
        ) as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException as error:
                os.unlink(file.name)
                if isinstance(error, OSError | RuntimeError) and _is_full(error, checkpoint, path.parent):
                    raise DiskFullError(_full(checkpoint, path)) from error
                raise
        _sync_folder(path.parent)


class DiskFullError(OSError):
    """The disk had no room for a checkpoint (the earlier one of its name is untouched) or for the log."""


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, a quota or the size that a file may have is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sweep(folder: str | os.PathLike[str], name: str = "") -> None:
    """Removes what processes that were killed while they wrote a checkpoint left of it: of this name, or of any."""
    for left in Path(folder).glob(f".{glob.escape(name) or '*'}.*.partial"):
        if not _is_being_written(left):
            left.unlink(missing_ok=True)


def _is_being_written(partial: Path) -> bool:
    """Whether another process of this machine that is still there writes it."""
    writer = re.search(r"\.(\d+)@([^.]+)\.[^.]*\.partial$", partial.name)
    if writer is None or writer[2] != _HOST or int(writer[1]) == os.getpid() or os.name == "nt":  # where the signal 0 is one
        return False
    try:
        os.kill(int(writer[1]), 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def _is_full(error: Exception, checkpoint: Any, folder: Path) -> bool:
    """torch's writer loses the number of the error: then the room tells."""
    if isinstance(error, OSError) and error.errno is not None:
        return is_full(error)
    return "inline_container" in str(error) or shutil.disk_usage(folder).free < _size(checkpoint)


def _full(checkpoint: Any, path: Path) -> str:
    free = shutil.disk_usage(path.parent).free
    return (
        f"no room for the checkpoint {path}: it needs about {_size(checkpoint) / 2**20:.0f} MiB, the disk of {path.parent} has "
        f"{free / 2**20:.0f} MiB left (or a quota less); make room and go on with --ckpt_path last"
    )


def _size(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(_size(item) for item in value)


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
