"""``dino-lightning retrieval``: is the same thing found among many images?"""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dino_lightning.data import ImageFiles, ImageFolder, find_splits, read_image
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.retrieval import Whitening, ranked, score
from dino_lightning.evaluation.whole import SQUARE_ROOTS, Pooling, thumbnail, whole_features
from dino_lightning.tools.checkpoint import images_of, load_module, networks_of

_BUILDINGS = {"roxford5k": (224, (1.0,)), "rparis6k": (512, SQUARE_ROOTS)}  # as the reference evaluates them: longest side, scales


class _Task(NamedTuple):
    """Images to search in, the queries (paths, and boxes left, top, right, bottom), and for each setting each query's positives and what
    does not count for it.
    """

    bank: list[Path]
    queries: list[Path]
    boxes: list[Sequence[float] | None]
    settings: dict[str, tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]


def retrieval(
    checkpoint: str,
    root: str,
    image_size: int | None = None,
    scales: tuple[float, ...] | None = None,
    pooling: Pooling = "cls",
    whiten_with: str | None = None,
    crop_queries: bool = False,
    trapezoid: bool = True,
    at: tuple[int, ...] = (1, 5, 10),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    compare: bool = False,
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Ranks images by the similarity of their features to each query's, and gives the mean average precision (section 4.2.1 of the paper).

    Of revisited Oxford and Paris (Radenović et al. 2018) where root holds ``gnd_roxford5k`` or ``gnd_rparis6k`` (``.pkl``, of which only
    lists, numbers, text and arrays are read and no code is run, or ``.json``) beside ``jpg/``. Of any other folder with class folders each
    image is a query, and the others of its class are what should be found.

    What decides the published numbers are the defaults: queries are whole images, longest sides of 224 pixels at one scale (Oxford) and
    512 at three (Paris), no whitening, average precision by trapezoids.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: of the images.
        image_size: pixels of an image's longest side; images are never enlarged. By default as above, of other folders that of the
            training's global crops.
        scales: of the sides, over which features are averaged; by default as above.
        pooling: cls, the backbone's features; gem, the generalised mean of patch features (p = 4); cls+gem, both beside each other.
        whiten_with: folder of other images, whose features whiten (about their mean).
        crop_queries: cut queries out of their images, where the set says where they are; the reference does not.
        trapezoid: average precision as the evaluation of revisited Oxford has it, or else the mean precision at the positives.
        at: ranks at which the mean precision is given too.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        compare: also the same network untrained.

    Returns:
        For "trained" (and "untrained"), of each setting (easy, medium and hard of the buildings, else "classes") the mean average
        precision and the mean precisions.

    Raises:
        FileNotFoundError: for images that the ground truth names and that are not there.
        UnreadableImage: for images that cannot be read.
        ValueError: for a broken ground truth, and folders without classes or with splits.
    """
    name, task = _task(Path(root))
    side, usual_scales = _BUILDINGS.get(name, (None, (1.0,)))
    module = load_module(checkpoint)
    shown = images_of(module, image_size if image_size is not None else side, mean, std)
    longest, scales = max(shown.size), usual_scales if scales is None else scales
    if min(scales, default=0) <= 0:
        raise ValueError(f"scales must be positive, such as 1,0.7071,0.5, got {scales}")
    others = ImageFiles([whiten_with], shown.in_chans) if whiten_with else ()
    results: dict[str, dict[str, tuple[float, ...]]] = {}
    networks = networks_of(module, compare)
    print(
        f"{name}: {len(task.queries)} queries among {len(task.bank)} images, longest side {longest}, scales {', '.join(f'{s:.3g}' for s in scales)}, {pooling}"
    )
    print(" " * 22 + f"{'mAP':>7}" + "".join(f"{f'mP@{k}':>8}" for k in at))
    for title, network in networks.items():

        def features(paths: Sequence[Path], boxes: Sequence[Sequence[float] | None] | None = None) -> Tensor:
            found = []
            for i, path in enumerate(tqdm(paths, desc=title, leave=False)):
                pixels = read_image(path, shown.in_chans)
                box = boxes[i] if boxes is not None else None
                if box is not None:
                    left, top, right, bottom = (round(edge) for edge in box)
                    pixels = np.ascontiguousarray(pixels[max(0, top) : bottom, max(0, left) : right])
                image = normalize(thumbnail(pixels, longest)[None].to(module.device), shown.mean, shown.std)
                found.append(whole_features(network, image, scales, pooling))
            return F.normalize(torch.cat(found), dim=1)

        bank = features(task.bank)
        queries = bank if task.queries is task.bank else features(task.queries, task.boxes if crop_queries else None)
        if whiten_with:
            whitening = Whitening(features([Path(others.path(i)) for i in range(len(others))]), centred=True)
            bank, queries = (F.normalize(whitening(some), dim=1) for some in (bank, queries))
        results[title] = {}
        for setting, (positives, ignored) in task.settings.items():
            found = score(ranked(bank, queries), positives, ignored, at, trapezoid)
            results[title][setting] = (found.mean_ap, *found.precisions)
            print(f"{title:12}{setting:10}" + f"{100 * found.mean_ap:7.1f}" + "".join(f"{100 * value:8.1f}" for value in found.precisions))
    return results


def holds_buildings(root: Path) -> bool:
    """Whether it holds the buildings of Oxford or Paris, with what should be found."""
    return any((root / f"gnd_{name}{suffix}").is_file() for name in _BUILDINGS for suffix in (".pkl", ".json"))


def _task(root: Path) -> tuple[str, _Task]:
    for name in _BUILDINGS:
        for suffix in (".pkl", ".json"):
            file = root / f"gnd_{name}{suffix}"
            if file.is_file():
                return name, _buildings(root, file)
    if find_splits(root)[1]:
        raise ValueError(f"{root} has splits; name one of them, such as {find_splits(root)[1][0]}, whose images search among each other")
    folder = ImageFolder(root)
    if folder.classes is None:
        raise ValueError(
            f"{root} has no class folders, and no gnd_roxford5k or gnd_rparis6k (.pkl or .json) beside jpg/: nothing says what should be found"
        )
    paths = [Path(folder.path(i)) for i in range(len(folder))]
    itself = np.arange(len(paths))[:, None]
    return root.name, _Task(paths, paths, [None] * len(paths), {"classes": (_OthersOfClass(folder.labels), itself)})


class _OthersOfClass(Sequence):
    """For each image the others of its class, found when they are asked for: together they are quadratic in number."""

    def __init__(self, labels: np.ndarray) -> None:
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> np.ndarray:
        found = np.flatnonzero(self._labels == self._labels[index])
        return found[found != index]


def _buildings(root: Path, file: Path) -> _Task:
    held = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else _plain_pickle(file)
    try:
        truths = [{name: np.asarray(query.get(name, ()), dtype=int) for name in ("easy", "hard", "junk")} for query in held["gnd"]]
        images = {name: [root / "jpg" / f"{image}.jpg" for image in held[name]] for name in ("imlist", "qimlist")}
        boxes = [query.get("bbx") for query in held["gnd"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is no ground truth of revisited Oxford or Paris (imlist, qimlist, gnd): {error!r}") from error
    if len(truths) != len(images["qimlist"]):
        raise ValueError(f"{file} has {len(images['qimlist'])} queries, but the truth of {len(truths)}")
    missing = [path for path in (*images["imlist"], *images["qimlist"]) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} images that {file.name} names are not there, the first of them {missing[0]}")
    for query, truth in enumerate(truths):
        wrong = [int(n) for numbers in truth.values() for n in numbers if not 0 <= n < len(images["imlist"])]
        if wrong:
            raise ValueError(
                f"{file} says of query {query} that image {wrong[0]} is what it means, but has {len(images['imlist'])} images, counted from 0"
            )

    def of(*names: str) -> list[np.ndarray]:
        return [np.concatenate([truth[name] for name in names]) for truth in truths]

    settings = {
        "easy": (of("easy"), of("junk", "hard")),
        "medium": (of("easy", "hard"), of("junk")),
        "hard": (of("hard"), of("junk", "easy")),
    }
    possible = {name: setting for name, setting in settings.items() if any(map(len, setting[0]))}
    return _Task(images["imlist"], images["qimlist"], boxes, possible)


class _Plain(pickle.Unpickler):
    """Of containers, numbers, text and numpy's arrays; nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in _ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which may be code")


_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # of text, as which old pickles hold bytes
}


def _plain_pickle(file: Path) -> Mapping[str, Any]:
    with open(file, "rb") as stream:
        try:
            return _Plain(stream, encoding="latin1").load()
        except Exception as error:  # a damaged one fails in any way
            raise ValueError(f"{file} cannot be read safely: {error}; its content as .json of the same name would be") from error
