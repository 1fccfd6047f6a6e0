"""``dino-lightning shard``: a folder of images in few large files, which a network file system or an object store serves faster."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dino_lightning.data import ImageFolder, find_splits
from dino_lightning.data.decode import read_file
from dino_lightning.data.shards import FACTS, INDEX, import_litdata
from dino_lightning.data.workers import cores
from dino_lightning.finished import names_hash
from dino_lightning.listing import is_address
from dino_lightning.tools.shrink import check_sizes, shrunk
from dino_lightning.training.randomness import generator


def shard(
    root: str, output: str, megabytes: int = 64, shorter: int | None = None, quality: int = 95, num_workers: int = 0, seed: int = 0
) -> None:
    """Writes the images of a folder into shards, which ``--data.root OUTPUT`` trains on; the same command goes on where it was interrupted.

    Files go in as they are (or smaller, with ``shorter``), in a random order, which training draws shard by shard anew in every epoch:
    give as many images as a few batches to a shard. With train/ and val/ (or validation/, test/) in root, each becomes a folder of
    shards. SHA256SUMS in each is for ``sha256sum --check``.

    Args:
        root: folder of images, flat or nested, with or without class folders.
        output: folder of the shards, outside of root; copy it to an object store as a whole.
        megabytes: of a shard.
        shorter: largest number of pixels of an image's shorter side, as of ``dino-lightning shrink``; by default files stay as they are.
        quality: of JPEGs that are made smaller, up to 95.
        num_workers: processes; 0 is one for each core.
        seed: of the order.

    Raises:
        ValueError: for an output within root or an address.
        FileExistsError: if something else lies in output.
    """
    if megabytes < 1:
        raise ValueError(f"megabytes must be at least 1, got {megabytes}")
    check_sizes(512 if shorter is None else shorter, quality)
    if is_address(output) or is_address(root):
        raise ValueError(
            f"shard writes from folder to folder, got {root} and {output}; copy the folder of shards to its address afterwards"
        )
    source, target = Path(root).resolve(), Path(output).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"output {output} and root {root} must lie outside of each other")
    train, queries = find_splits(source)
    options = {"megabytes": megabytes, "shorter": shorter, "quality": quality, "seed": seed}
    classes = None
    for images in (train, *queries):
        classes = _write(images, target / images.relative_to(source), classes, options, num_workers or cores())


def _write(root: Path, target: Path, classes: list[str] | None, options: dict[str, int | None], workers: int) -> list[str] | None:
    litdata = import_litdata()
    folder = ImageFolder(root, classes=classes)
    names = [os.path.relpath(folder.path(i), root) for i in range(len(folder))]
    facts = {"classes": folder.classes, "images": len(names), "names": names_hash(names), **options}
    begun = target / ".begun.json"
    written = _read(target / INDEX).get(FACTS)
    if written is not None and {name: written.get(name) for name in facts} == facts:
        print(f"{target}: {len(names)} images are there already")
        return folder.classes
    before = _read(begun)
    if target.exists() and any(target.iterdir()) and {name: before.get(name) for name in facts} != facts:
        raise FileExistsError(f"{target} holds something else than these images by these options; name a new folder, or remove it")
    target.mkdir(parents=True, exist_ok=True)
    workers = before.get("workers", workers)  # litdata goes on with as many only
    _write_whole(begun, {**facts, "workers": workers})
    order = generator(options["seed"]).permutation(len(names)).tolist()
    labels = folder.labels if folder.labels is not None else np.full(len(names), -1)
    # Lists, as which litdata reads them again from what an interrupted command left.
    samples = [[str(root / names[i]), names[i], int(labels[i]), options["shorter"], options["quality"]] for i in order]
    if not (target / INDEX).is_file():  # else interrupted behind it
        litdata.optimize(
            _sample, samples, str(target), chunk_bytes=f"{options['megabytes']}MB", num_workers=min(workers, len(samples)),
            reorder_files=False, use_checkpoint=True, verbose=False,
            start_method="fork" if sys.platform == "linux" else "spawn",  # of a process that has done nothing with torch
        )  # fmt: skip
    index = json.loads((target / INDEX).read_text())
    sizes, lines = {}, []
    for chunk in tqdm(index["chunks"], desc="SHA-256", unit="shard", leave=False):
        file = target / chunk["filename"]
        with open(file, "rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n")
        sizes[file.name] = file.stat().st_size
    (target / "SHA256SUMS").write_text("".join(lines))
    index[FACTS] = facts | {"bytes": sizes}
    _write_whole(target / INDEX, index)
    begun.unlink()
    shutil.rmtree(target / ".checkpoints", ignore_errors=True)
    print(f"{target}: {len(names)} images in {len(sizes)} shards, {sum(sizes.values()) / 1e6:.1f} MB")
    return folder.classes


def _read(file: Path) -> dict:
    """Empty where there is none, or a half-written one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_whole(file: Path, content: dict) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, file)


def _sample(what: list) -> dict[str, np.ndarray | int]:
    """Arrays, since litdata takes text that names a file for what the file holds."""
    path, name, label, shorter, quality = what
    data = b""
    with contextlib.suppress(Exception):  # what cannot be read is for training to name
        data = read_file(path)
        data = shrunk(Path(path), shorter, quality) if shorter else data
    return {"image": np.frombuffer(data, np.uint8), "label": label, "name": np.frombuffer(os.fsencode(name), np.uint8)}
