"""Files with weights, read without running any code that they might hold."""

import argparse
import json
import pickle
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a ``.pth``, ``.ckpt``, ``.bin`` or ``.safetensors`` file holds, on the CPU, and what its metadata say of the network.

    Tensors and plain types only, and of what the reference writes beside them: its options, an argparse Namespace, in which there
    may be a path, and its learning rates, numbers of numpy.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not whole, or holds other classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_DATA):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise ValueError(
            f"{path} holds no weights that can be read safely, or is not whole: {why_unreadable(path, error)}; expected a checkpoint "
            "or weights as torch.save writes them (.ckpt, .pth, .bin), or .safetensors"
        ) from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}; expected named weights")
    return held, {}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of ``dino-lightning fit`` holds; its tensors stay on the disk until they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, or not a whole one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise ValueError(
            f"{path} is no checkpoint, or not a whole one: {why_unreadable(Path(path), error)}; expected a checkpoint of dino-lightning fit"
        ) from None


# Classes without any code that could do harm; the second name is that of numpy below version 2.
_SCALAR = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
_DATA = [
    argparse.Namespace,
    PosixPath,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype("float64")),
]


# What is given for weights by mistake, by its first bytes.
_OTHERS = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a film",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x93NUMPY": "an array of numpy",
    b"\x1f\x8b": "a gzip archive",
    b"<": "a web page",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}


def why_unreadable(path: Path, error: Exception) -> str:
    """Why torch cannot read a file, in one line: what it is instead, the classes that it holds, or the first line of the error.

    Not what torch says of a pickle that it refuses, which is to load it unsafely.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        return "it is empty"
    other = next((other for bytes_, other in _OTHERS.items() if start.startswith(bytes_)), None)
    if other is not None:
        return f"it begins like {other}"
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or the pickles of older versions
        return f"it begins with {start[:16]!r}"
    try:
        with torch.serialization.safe_globals(_DATA):
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older or a damaged file
        classes = []
    if classes:
        return f"it holds {', '.join(sorted(classes))}, which may be code"
    if isinstance(error, pickle.UnpicklingError):
        return "it is a pickle of more than tensors and plain types"
    said = next(iter(str(error).splitlines()), "")
    return said if isinstance(error, (RuntimeError, OSError)) and said else f"its pickle is damaged ({type(error).__name__}: {said})"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("dino_lightning", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
