"""An extraction of features that was finished, recognised without torch.

The full command compares the weights' hash, for which it must load them. Here the same options, the same names of images and a
checkpoint file that was not touched since are enough; wherever one of them differs, the full command decides.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino_lightning import __version__
from dino_lightning.listing import list_named

FEATURES, PATHS, FACTS = "features.npy", "paths.txt", "features.json"


def report(
    images: Sequence[str],
    *,
    checkpoint: str,
    output: str,
    parquet: bool,
    what: str,
    n_blocks: int,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int,
    num_workers: int,
) -> str | None:
    """What ``extract`` with these arguments says at its end, if an earlier one left nothing to do; else None.

    (Batch size and workers do not matter.)
    """
    folder = Path(output)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        rows, *row_shape = np.load(folder / FEATURES, mmap_mode="r").shape  # an error where the file is shorter
    except (OSError, ValueError, EOFError):  # of a file without a byte
        return None
    now = asked(checkpoint, what, n_blocks, image_size, mean, std)
    known = (facts.get("complete"), facts.get("dino_lightning"), facts.get("asked"), facts.get("features"))
    if now is None or known != (True, __version__, now, rows) or (parquet and not (folder / "features.parquet").is_file()):
        return None
    if facts["images_sha256"] != names_hash(list_named(images, without=[os.path.abspath(folder / FEATURES)])):
        return None
    return summary(rows, row_shape, output, facts["unreadable"])


def asked(
    checkpoint: str,
    what: str,
    n_blocks: int,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Any] | None:
    """What decides the features beside the images, as JSON gives it back; None for weights that the name does not fix."""
    files = _stamps(Path(checkpoint))
    if not files and checkpoint.startswith("timm/"):
        return None
    options = {"n_blocks": n_blocks if what == "layers" else None, "image_size": image_size}
    numbers = {name: values and list(values) for name, values in (("mean", mean), ("std", std))}
    return {"checkpoint": os.path.abspath(checkpoint) if files else checkpoint, "files": files, "what": what, **options, **numbers}


def _stamps(source: Path) -> list[list[Any]]:
    """Name, size and time of change of the file, or of those in the folder; nothing for a published name."""
    files = sorted(source.iterdir()) if source.is_dir() else [source] if source.exists() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def names_hash(paths: Iterable[str]) -> str:
    """SHA-256 of the paths, in their order.

    Raises:
        ValueError: for a path with a line break.
    """
    digest = hashlib.sha256()
    for path in paths:
        name = os.fsencode(path)
        if b"\n" in name or b"\r" in name:
            raise ValueError(f"the name {path!r} has a line break, and lists of images have a line for each; rename it")
        digest.update(name + b"\n")
    return digest.hexdigest()


def summary(rows: int, row_shape: Sequence[int], output: str, unreadable: int) -> str:
    """The line that ends ``extract``."""
    numbers = " × ".join(map(str, row_shape))
    rest = f"; {unreadable} could not be read" if unreadable else ""
    return f"features of {rows} images, {numbers} numbers each, in {output}{rest}"
