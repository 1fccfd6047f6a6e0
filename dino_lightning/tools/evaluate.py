"""``dino-lightning evaluate``: the report of a checkpoint, to look at and to send to a colleague."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dino_lightning
from dino_lightning.data import ImageFolder, find_splits, open_images
from dino_lightning.data.shards import is_shards
from dino_lightning.evaluation.clusters import has_sklearn
from dino_lightning.listing import is_address
from dino_lightning.tools import evaluation_parts as parts
from dino_lightning.tools import page
from dino_lightning.tools.checkpoint import images_of, load_module
from dino_lightning.tools.copies import holds_originals
from dino_lightning.tools.evaluation_parts import RAW, TRAINED, UNTRAINED, Measure, Part, Seen, Subject
from dino_lightning.tools.folders import labelled_folders
from dino_lightning.tools.retrieval import holds_buildings
from dino_lightning.tools.segment import holds_masks
from dino_lightning.tools.track import holds_davis

_COLUMNS = (RAW, UNTRAINED, TRAINED)
# Sets of a known layout, where their images lie, and what is measured.
_SETS = (
    (holds_buildings, ("jpg",), parts.buildings),
    (holds_originals, ("original",), parts.copied),
    (holds_davis, ("JPEGImages",), parts.followed),
    (holds_masks, ("JPEGImages", "images"), parts.told_apart),
)
_WIDE = 46  # letters of a measure's name in the printed table


def evaluate(
    checkpoint: str,
    root: str,
    queries: str | None = None,
    output: str = "evaluation",
    shots: tuple[float, ...] = (0.01, 0.1, 5),
    draws: int = 5,
    k: int = 20,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    compare: bool = True,
) -> dict[str, dict[str, float]]:
    """Everything that a folder of images lets one say about a checkpoint: a table, and a page to send to a colleague.

    Of any images: whether the features have collapsed, what the network looks at, which images are alike to it, in which groups, and
    where they lie on a map. With class folders in train/ and val/ (or validation/, test/) also k-NN, linear classifiers, and k-NN and
    logistic regression of few labels. Of the layouts that retrieval, copies, track and segment know, what these measure.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: of the images.
        queries: name of the query folder; by default the first of val, validation and test that there is.
        output: folder of index.html, a page that needs nothing but itself, and results.json.
        shots: labels that are given: below 1 a share of each class's, else so many of each.
        draws: of these labels, at random.
        k: neighbours that vote.
        image_size: pixels of the images' side; by default that of the training's global crops.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        batch_size: images at a time.
        num_workers: worker processes.
        seed: of draws, clusters and classifiers.
        compare: also the same network untrained, and the raw pixels, what the features must beat.

    Returns:
        For each measure the value of "trained" (and "untrained", "raw pixels"), as fractions where they are shown in per cent.
    """
    if is_address(root) or is_shards(root):
        raise ValueError(f"{root} holds shards; evaluate draws pictures, and needs the folder of images that they were made of (knn and linear take them)")
    module = load_module(checkpoint)
    subject = Subject(checkpoint, module, images_of(module, image_size, mean, std), image_size, {"mean": mean, "std": std}, compare)
    print(f"{checkpoint} on {root}; in per cent")
    print(" " * _WIDE + "".join(f"{name:>16}" for name in _COLUMNS if compare or name == TRAINED))
    found: list[Part] = []
    for part in _parts(subject, root, queries, shots, draws, k, batch_size, num_workers, seed):
        found.append(part)
        for measure in part.measures:
            cells = (_cell(measure, name) for name in _COLUMNS if compare or name == TRAINED)
            print(f"{measure.name:{_WIDE}}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    facts = _facts(subject, root)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**facts, "measures": _told(found)}, indent=2) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(_page(subject, facts, found), encoding="utf-8")
    print(f"the page is {folder / 'index.html'}, the numbers are in {folder / 'results.json'}")
    return {measure.name: measure.values for part in found for measure in part.measures}


def _parts(
    subject: Subject, root: str, queries: str | None, shots: Sequence[float], draws: int, k: int, batch_size: int, num_workers: int, seed: int
) -> Iterator[Part]:
    """Those that apply, each when it is done."""
    if run := parts.course(subject.checkpoint):
        yield run
    bank_folder, query_folder, labelled = _folders(Path(root), queries, subject.shown.in_chans)

    def seen(source: ImageFolder) -> Seen:
        total = -(-len(source) // batch_size)
        return parts.see(subject, source, labelled, batch_size, num_workers, _bar(f"features of {Path(source.root).name}", total))

    bank = seen(bank_folder)
    asked = seen(query_folder) if query_folder else bank
    yield parts.collapse(bank)
    if labelled and query_folder:
        yield parts.neighbours_vote(bank, asked, min(k, len(bank.paths)))
        yield parts.few_labels(bank, asked, shots, draws, k, seed)
        yield parts.separable(subject, root, queries, num_workers, seed)
    elif labelled:
        yield parts.nearest_of_class(bank)
    for holds, _, part in _SETS:
        if holds(Path(root)):
            yield part(subject, root)
    if drawn := parts.looks(asked, subject):
        yield drawn
    yield parts.alike(bank, asked, subject)
    if has_sklearn():
        yield parts.groups(asked, subject, seed)
    yield parts.mapped(asked, subject, seed)


def _folders(root: Path, queries: str | None, in_chans: int) -> tuple[ImageFolder, ImageFolder | None, bool]:
    """Images, queries if there are any, and whether they have classes."""
    for holds, below, _ in _SETS:
        if holds(root) and not (root / "train").is_dir():
            folder = next(root / name for name in below if (root / name).is_dir())
            return ImageFolder(folder, in_chans), None, False  # folders of films and splits are no classes
    train, found = find_splits(root)
    images = open_images(train, in_chans)
    if images.classes is not None and (found or queries):
        return *labelled_folders(str(root), queries, in_chans), True
    return images, None, images.classes is not None


def _bar(what: str, total: int) -> Callable:
    return lambda batches: tqdm(batches, desc=what, total=total, leave=False)


def _cell(measure: Measure, name: str) -> str:
    if name not in measure.values:
        return ""
    scale = 100 if measure.percent else 1
    margin = f" ± {scale * measure.margins[name]:.1f}" if name in measure.margins else ""
    return f"{scale * measure.values[name]:.1f}{margin}"


def _facts(subject: Subject, root: str) -> dict[str, Any]:
    backbone = subject.module.evaluated.backbone
    return {
        "checkpoint": subject.checkpoint,
        "root": str(root),
        "method": type(subject.module).__name__,
        "backbone": type(backbone).__name__,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "image_size": list(subject.shown.size),
        "date": date.today().isoformat(),
        "dino_lightning": dino_lightning.__version__,
        "torch": torch.__version__,
        "device": str(subject.module.device),
        "machine": platform.machine(),
    }


def _told(found: Sequence[Part]) -> list[dict[str, Any]]:
    return [{"part": part.title, **measure._asdict()} for part in found for measure in part.measures]


def _page(subject: Subject, facts: dict[str, Any], found: Sequence[Part]) -> str:
    columns = [name for name in _COLUMNS if subject.compare or name == TRAINED]
    rows: list[list[str] | page.Heading] = []
    for part in found:
        if part.measures:
            rows.append(page.Heading(part.title, part.about))
            rows += [[measure.name, *(_cell(measure, name) for name in columns)] for measure in part.measures]
    size = " × ".join(map(str, subject.shown.size))
    about = (
        f"{facts['backbone']} of {facts['parameters'] / 1e6:.1f} million parameters, trained with {facts['method'].removesuffix('Module')}, "
        f"on {facts['root']} at {size} pixels. dino_lightning {facts['dino_lightning']}, {facts['date']}."
    )
    body = [page.paragraph(about), page.table(["in per cent, ranks as they are", *columns], rows)]
    for part in (part for part in found if part.blocks):
        body += [f"<h2>{part.title}</h2>", page.paragraph(part.about), *(f"<div>{block}</div>" for block in part.blocks)]
    return page.document(f"What {Path(subject.checkpoint).name} has learned", "\n".join(body))
