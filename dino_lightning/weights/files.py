"""Files with weights, read without running any code that they might hold."""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a ``.pth``, ``.ckpt``, ``.bin`` or ``.safetensors`` file holds, on the CPU, and what its metadata say of the network.

    Tensors and plain types only; of classes, the argparse Namespace alone, in which the reference keeps its options.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not whole, or holds other classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} holds no weights that can be read safely, or is not whole: {reason}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}; expected named weights")
    return held, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs safetensors: pip install safetensors", name="safetensors") from error
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("dino_lightning", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
