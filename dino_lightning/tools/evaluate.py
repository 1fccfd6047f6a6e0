"""``dino-lightning evaluate``: the report of a checkpoint, to look at and to send to a colleague."""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dino_lightning
from dino_lightning.data import ImageFolder, find_splits, open_images
from dino_lightning.door.errors import of_the_user
from dino_lightning.evaluation.clusters import has_sklearn
from dino_lightning.evaluation.low_shot import check_shots
from dino_lightning.listing import is_address
from dino_lightning.tools import evaluation_parts as parts
from dino_lightning.tools import page
from dino_lightning.tools.checkpoint import images_of, is_ours, load_module
from dino_lightning.tools.copies import holds_originals
from dino_lightning.tools.evaluation_parts import Measure, Part
from dino_lightning.tools.folders import labelled_folders
from dino_lightning.tools.retrieval import holds_buildings
from dino_lightning.tools.seen import RAW, TRAINED, UNTRAINED, Seen, Subject, see
from dino_lightning.tools.segment import holds_masks
from dino_lightning.tools.track import holds_davis

_COLUMNS = (RAW, UNTRAINED, TRAINED)


class _Set(NamedTuple):
    """Of a known layout: whether a root holds it, the folders of which one has its images, and what is measured."""

    name: str
    holds: Callable[[Path], bool]
    images: Sequence[str]
    measure: Callable[[Subject, str], Part]


_SETS = (
    _Set("retrieval", holds_buildings, ("jpg",), parts.buildings),
    _Set("copies", holds_originals, ("original",), parts.copied),
    _Set("tracking", holds_davis, ("JPEGImages",), parts.followed),
    _Set("segmentation", holds_masks, ("JPEGImages", "images"), parts.told_apart),
)


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

    What cannot be measured is said, and the rest goes on; the files are written anew after each part.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: of the images.
        queries: name of the query folder; by default the first of val, validation and test that there is.
        output: folder of index.html, a page that needs nothing but itself, and results.json.
        shots: labels that are given: below 1 a share of each class's, else so many of each.
        draws: of these labels, at random.
        k: neighbours that vote.
        image_size: pixels of the images' side (attention and segmentation: twice that; retrieval, copies and tracking have their own); by
            default that of the training's global crops.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        batch_size: images at a time.
        num_workers: worker processes.
        seed: of draws, clusters and classifiers.
        compare: also the same network untrained, and the raw pixels, what the features must beat.

    Returns:
        For each measure the value of "trained" (and "untrained", "raw pixels"), as fractions where they are shown in per cent.

    Raises:
        FileNotFoundError: without images.
        NotADirectoryError: if the output is a file.
        ValueError: for options out of their range, shards, or if no image can be read.
    """
    check_shots(shots, draws)
    for name, value in {"k": k, "batch_size": batch_size, "image_size": image_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{output} is a file; choose another output, a folder for index.html and results.json")
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    subject = Subject(checkpoint, module, shown, image_size, {"mean": mean, "std": std}, compare)
    known = _set_of(Path(root))
    bank_folder, query_folder = _folders(Path(root), known, queries, shown.in_chans)
    if not isinstance(bank_folder, ImageFolder):
        raise ValueError(
            f"{root} holds shards; evaluate draws pictures, and needs the folder of images that they were made of (knn and linear take them)"
        )
    labelled = bank_folder.classes is not None and known is None  # folders of films and splits are no classes

    def seen(source: ImageFolder) -> Seen:
        return see(subject, source, labelled, batch_size, num_workers, f"features of {Path(source.root).name}")

    bank = seen(bank_folder)
    asked = seen(query_folder) if query_folder else None
    facts = _facts(subject, root, bank, asked)
    columns = [name for name in _COLUMNS if compare or name == TRAINED]
    print(_about(facts))
    print(f"{'in per cent, ranks as they are':56}" + "".join(f"{name:>16}" for name in columns))
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Part] = []
    for title, make in _parts(subject, root, known, queries, bank, asked, shots, draws, k, num_workers, seed):
        try:
            part = make()
        except Exception as error:
            if not of_the_user(error):
                raise
            part = Part(title, f"Not measured: {error}")
            print(f"{title}: not measured: {error}")
        if part is None:
            continue
        found.append(part)
        for measure in part.measures:
            print(f"{_named(measure):56}" + "".join(f"{_cell(measure, name):>16}" for name in columns), flush=True)
        _write(folder, facts, columns, found)
    print(f"the page is {folder / 'index.html'}, the numbers are in {folder / 'results.json'}")
    return {measure.name: measure.values for part in found for measure in part.measures}


def _parts(
    subject: Subject, root: str, known: _Set | None, queries: str | None, bank: Seen, asked: Seen | None, shots: Sequence[float], draws: int,
    k: int, num_workers: int, seed: int,
) -> Iterator[tuple[str, Callable[[], Part | None]]]:  # fmt: skip
    """Those that apply, by a name for the case that they fail, in the order in which they are shown."""
    yield "the run", lambda: parts.course(subject)
    yield "collapse", lambda: parts.collapse(bank)
    if bank.classes and asked:
        yield "k-NN", lambda: parts.neighbours_vote(bank, asked, subject, k)
        yield "few labels", lambda: parts.few_labels(bank, asked, shots, draws, k, seed)
        yield "linear", lambda: parts.separable(subject, root, queries, num_workers, seed)
    elif bank.classes:
        yield "nearest", lambda: parts.nearest_of_class(bank)
    if known:
        yield known.name, lambda: known.measure(subject, root)
    shown = asked or bank
    yield "attention", lambda: parts.looks(shown, subject)
    yield "neighbours", lambda: parts.alike(bank, shown, subject)
    if has_sklearn():
        yield "clusters", lambda: parts.groups(shown, subject, seed)
    yield "map", lambda: parts.mapped(shown, subject, seed)


def _set_of(root: Path) -> _Set | None:
    """Which set of a known layout it is, if it has no train/."""
    return None if is_address(root) or (root / "train").is_dir() else next((known for known in _SETS if known.holds(root)), None)


def _folders(root: Path, known: _Set | None, queries: str | None, in_chans: int) -> tuple[Any, Any]:
    """Images, and queries if there are any with the same classes."""
    if known:
        below = next((root / name for name in known.images if (root / name).is_dir()), None)
        if below is None:
            raise FileNotFoundError(f"{root} has the lists of a set, but not its images: there is no {' or '.join(known.images)}/")
        return ImageFolder(below, in_chans), None
    train, found = find_splits(root)
    images = open_images(train, in_chans)
    if images.classes is None or not (found or queries):
        return images, None
    try:
        return labelled_folders(str(root), queries, in_chans)
    except ValueError as error:  # queries without classes: train/ by itself
        if queries:
            raise
        print(f"the queries are left out: {error}")
        return images, None


def _named(measure: Measure) -> str:
    return f"{measure.name} ({measure.note})" if measure.note else measure.name


def _cell(measure: Measure, name: str) -> str:
    if name not in measure.values:
        return ""
    scale = 100 if measure.percent else 1
    margin = f" ± {scale * measure.margins[name]:.1f}" if measure.margins else ""
    return f"{scale * measure.values[name]:.1f}{margin}"


def _facts(subject: Subject, root: str, bank: Seen, asked: Seen | None) -> dict[str, Any]:
    backbone = subject.module.evaluated.backbone
    return {
        "checkpoint": subject.checkpoint,
        "method": subject.module.title if is_ours(subject.checkpoint) else None,
        "backbone": type(backbone).__name__,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "root": str(root),
        "images": len(bank.paths),
        "queries": len(asked.paths) if asked else None,
        "classes": len(bank.classes) or None,
        "unreadable": bank.unreadable + (asked.unreadable if asked else 0),
        "image_size": list(subject.shown.size),
        "date": date.today().isoformat(),
        "dino_lightning": dino_lightning.__version__,
        "torch": torch.__version__,
        "device": str(subject.module.device),
    }


def _about(facts: dict[str, Any]) -> str:
    trained = f", trained with {facts['method']}" if facts["method"] else ""
    counts = [f"{facts['images']} images"]
    counts += [f"{facts[name]} {name}" for name in ("queries", "classes") if facts[name]]
    counts += [f"{facts['unreadable']} unreadable ones left out"] if facts["unreadable"] else []
    return (
        f"{facts['backbone']} of {facts['parameters'] / 1e6:.1f} million parameters{trained} ({facts['checkpoint']}). Evaluated on {facts['root']}: "
        f"{', '.join(counts)}, shown at {'×'.join(map(str, facts['image_size']))} pixels."
    )


def _write(folder: Path, facts: dict[str, Any], columns: Sequence[str], found: Sequence[Part]) -> None:
    measures = [{"part": part.title, **measure._asdict()} for part in found for measure in part.measures]
    (folder / "results.json").write_text(json.dumps({**facts, "measures": measures}, indent=2) + "\n", encoding="utf-8")
    # File names may hold what is no text.
    (folder / "index.html").write_text(_page(facts, columns, found), encoding="utf-8", errors="replace")


def _page(facts: dict[str, Any], columns: Sequence[str], found: Sequence[Part]) -> str:
    rows: list[list[str] | page.Heading] = []
    for part in found:
        if not part.blocks or part.measures:
            rows.append(page.Heading(part.title, part.about))
            rows += [[_named(measure), *(_cell(measure, name) for name in columns)] for measure in part.measures]
    made = f"dino_lightning {facts['dino_lightning']}, torch {facts['torch']}, {facts['device']}, {facts['date']}."
    body = [page.paragraph(_about(facts)), page.paragraph(made), page.table(["in per cent, ranks as they are", *columns], rows)]
    for part in (part for part in found if part.blocks):
        about = [] if part.measures else [page.paragraph(part.about)]
        body += [f"<h2>{part.title}</h2>", *about, *(f"<div>{block}</div>" for block in part.blocks)]
    checkpoint = Path(facts["checkpoint"])
    ours = checkpoint.parent.name == "checkpoints"
    return page.document(f"What {checkpoint.parent.parent.name if ours else checkpoint.name} has learned", "\n".join(body))
