"""The weights that the authors of DINO and DINOv2 published, by the names of their torch.hub entries."""

import hashlib
import os
import urllib.error
from pathlib import Path

import torch

_DINO = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}14/dinov2_{0}14_{1}.pth"
PUBLISHED = {
    "dino_vits16": _DINO.format("dino_deitsmall16_pretrain"),
    "dino_vits8": _DINO.format("dino_deitsmall8_pretrain"),
    "dino_vitb16": _DINO.format("dino_vitbase16_pretrain"),
    "dino_vitb8": _DINO.format("dino_vitbase8_pretrain"),
    "dino_resnet50": _DINO.format("dino_resnet50_pretrain"),
    **{f"dinov2_{size}14": _DINOV2.format(size, "pretrain") for size in ("vits", "vitb", "vitl", "vitg")},
    **{f"dinov2_{size}14_reg": _DINOV2.format(size, "reg4_pretrain") for size in ("vits", "vitb", "vitl", "vitg")},
}


def fetch(name: str) -> Path:
    """The file of a published backbone, downloaded once into torch.hub's cache; ``remember`` it when it was read.

    Raises:
        ConnectionError: if it cannot be downloaded, saying where to put the file.
        ValueError: if the file is not the one that was remembered.
    """
    address = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path))  # to a file beside it first, so that it is whole or not there
        except (urllib.error.URLError, OSError) as error:
            raise ConnectionError(f"cannot download {address} ({error}); on a machine without network, put this file to {path}") from error
    record = _record(path)
    if record.exists() and record.read_text().strip() != _sha256(path):
        raise ValueError(
            f"{path} is not the file that was read first: its SHA-256 is {_sha256(path)}, {record.name} says "
            f"{record.read_text().strip()}. Delete both to download it again"
        )
    return path


def remember(path: Path) -> None:
    """Writes its SHA-256 down beside it, against which it is compared from now on."""
    if not _record(path).exists():
        partial = path.with_name(f"{path.name}.sha256.{os.getpid()}")
        partial.write_text(_sha256(path) + "\n")
        os.replace(partial, _record(path))


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
