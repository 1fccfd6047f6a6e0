"""The parts of ``dino-lightning evaluate``: each says what its numbers mean, and draws."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_lightning.data import ImageFolder
from dino_lightning.evaluation import knn_accuracy, nearest
from dino_lightning.evaluation.clusters import by_chance, kmeans, nmi, purity
from dino_lightning.evaluation.embedding import has_umap, plane_pca, plane_umap
from dino_lightning.evaluation.features import features_with_paths, raw_pixels
from dino_lightning.evaluation.low_shot import low_shot
from dino_lightning.evaluation.spatial import NoSpatialMapError
from dino_lightning.evaluation.spread import feature_std, rank_me
from dino_lightning.methods.base import Method
from dino_lightning.tools import page, run_log
from dino_lightning.tools.attention import attention
from dino_lightning.tools.checkpoint import Images, untrained
from dino_lightning.tools.clusters import draw_clusters
from dino_lightning.tools.copies import copies
from dino_lightning.tools.linear import linear
from dino_lightning.tools.neighbors import draw_neighbors
from dino_lightning.tools.retrieval import retrieval
from dino_lightning.tools.segment import segment
from dino_lightning.tools.thumbnails import Thumbnails
from dino_lightning.tools.track import track

TRAINED, UNTRAINED, RAW = "trained", "untrained", "raw pixels"
_LOOKED_AT, _ASKED, _NEIGHBORS = 6, 6, 8  # images in the pictures
_RANKED = 10_000  # features of which the rank is computed, the first ones
_MAPPED, _SIDE = 1500, 48  # points of the map, and pixels of their pictures
_GROUPS, _CLUSTERED = 10, 20_000  # clusters without classes, and images that are clustered
_CURVES = {"val/knn_top1": "k-NN accuracy of the queries against steps", "train/loss": "Loss against steps"}


class Measure(NamedTuple):
    """A line of the table: of "trained" (and "untrained", "raw pixels") a value, a fraction if it is shown in per cent, and half of its
    95 % interval where there is one.
    """

    name: str
    values: dict[str, float]
    margins: dict[str, float] = {}
    percent: bool = True


class Part(NamedTuple):
    """``about``: what the numbers and pictures say; ``blocks``: of HTML."""

    title: str
    about: str
    measures: Sequence[Measure] = ()
    blocks: Sequence[str] = ()


class Subject(NamedTuple):
    """What is evaluated; ``colours`` are a mean and std that were asked for, else None."""

    checkpoint: str
    module: Method
    shown: Images
    image_size: int | None
    colours: dict[str, tuple[float, ...] | None]
    compare: bool


class Seen(NamedTuple):
    """Images as the networks see them: of each network features (N, D), on the device; N paths; labels (N,), -1 without."""

    features: dict[str, Tensor]
    paths: list[str]
    labels: Tensor
    classes: list[str]

    def spread_out(self, n: int) -> list[int]:
        """At most n indices, evenly over all, which are in the order of the classes."""
        return np.unique(np.linspace(0, len(self.paths) - 1, n).round().astype(int)).tolist()


def see(subject: Subject, source: ImageFolder, labelled: bool, batch_size: int, num_workers: int, batches: Callable) -> Seen:
    """The readable images of a folder, which are read once for all networks; ``batches`` shows the progress of an iterator."""
    networks: dict[str, Callable[[Tensor], Tensor]] = {TRAINED: subject.module}
    if subject.compare:
        networks = {RAW: raw_pixels, UNTRAINED: untrained(subject.module), **networks}
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    paths: list[str] = []

    def all_of_them(images: Tensor) -> Tensor:
        for name, network in networks.items():
            found[name].append(network(images).float())
        return found[TRAINED][-1]

    views, device = subject.shown._asdict(), subject.module.device
    for _, some in batches(features_with_paths(all_of_them, source, **views, batch_size=batch_size, num_workers=num_workers, device=device)):
        paths += some
    if not paths:
        raise ValueError(f"none of the {len(source)} images of {source.root} could be read; the log says why")
    labels = torch.full((len(paths),), -1)
    if labelled:
        of_path = {source.path(i): int(source.labels[i]) for i in range(len(source))}
        labels = torch.tensor([of_path[path] for path in paths])
    return Seen({name: torch.cat(parts) for name, parts in found.items()}, paths, labels.to(device), source.classes if labelled else [])


def course(checkpoint: str) -> Part | None:
    """How the run went, if its log lies where fit writes it."""
    folder = Path(checkpoint).resolve().parent.parent
    told = run_log.curves(folder, tuple(_CURVES)) if (folder / "config.yaml").is_file() else {}
    blocks = []
    for key, what in _CURVES.items():
        if points := told.get(key):
            kept = points[:: max(1, len(points) // 1000)] + points[-1:]
            blocks += [f"<h3>{what}</h3>", page.lines([page.Line(key, kept)], what, percent=key.startswith("val/"))]
    return Part("The run", f"As its log in {folder} has it. The loss tells little: it falls while everything collapses, too.", (), blocks) if blocks else None


def collapse(seen: Seen) -> Part:
    """How widely the features spread."""
    some = {name: features[:_RANKED] for name, features in seen.features.items() if name != RAW}
    ranks = {name: rank_me(features) for name, features in some.items()}
    spread = {name: feature_std(features).item() for name, features in some.items()}
    width = some[TRAINED].shape[1]
    return Part(
        "Has it collapsed?",
        f"The effective rank (RankMe) of the {width} features, 1 if all images had the same ones, and their spread over all directions, "
        "0 in that case.",
        [Measure(f"effective rank of {width}", ranks, percent=False), Measure("spread", spread)],
    )


def neighbours_vote(bank: Seen, queries: Seen, k: int) -> Part:
    """k-NN accuracy."""
    accuracies = {name: knn_accuracy(bank.features[name], bank.labels, queries.features[name], queries.labels, k=k) for name in bank.features}
    measures = [Measure(f"k-NN of {k}, top-1", {name: top1 for name, (top1, _) in accuracies.items()})]
    if len(bank.classes) > 5:
        measures.append(Measure(f"k-NN of {k}, top-5", {name: top5 for name, (_, top5) in accuracies.items()}))
    chance = bank.labels.bincount().max().item() / len(bank.labels)
    return Part(
        "Do the nearest have the same class?",
        f"Each query's class is voted for by its {k} nearest images of train/. Who always says the most frequent class is right in "
        f"{100 * chance:.1f} % of train/.",
        measures,
    )


def nearest_of_class(seen: Seen) -> Part:
    """Where there are classes, but no queries."""
    values = {}
    for name, features in seen.features.items():
        _, order = nearest(features, features, 2)
        itself = torch.arange(len(order), device=order.device)
        other = torch.where(order[:, 0] == itself, order[:, 1], order[:, 0])
        values[name] = (seen.labels[other] == seen.labels).float().mean().item()
    return Part(
        "Do the nearest have the same class?",
        "Whether the image nearest to each is of its class. For more, set images aside: folders train/ and val/.",
        [Measure("nearest is of its class", values)],
    )


def few_labels(bank: Seen, queries: Seen, shots: Sequence[float], draws: int, k: int, seed: int) -> Part:
    """k-NN and logistic regression of few labels."""
    found = {
        name: low_shot(bank.features[name], bank.labels, queries.features[name], queries.labels, shots, draws=draws, k=k, seed=seed)
        for name in bank.features
    }
    measures = []
    for i, n in enumerate(shots):
        of_each = {name: results[i] for name, results in found.items()}
        given = f"{100 * n:g} % of the labels" if n < 1 else f"{int(n)} label{'s' * (n > 1)} a class"
        for kind in ("knn", "logistic"):
            values, margins = ({name: getattr(one, kind + end) for name, one in of_each.items()} for end in ("", "_margin"))
            called = "k-NN" if kind == "knn" else "logistic"
            measures.append(Measure(f"{given} ({of_each[TRAINED].labels}), {called}", values, margins if draws > 1 else {}))
    return Part(
        "How far do few labels go?",
        f"Means over {draws} draws of the labels, and the 95 % intervals of these means over the draws: k-NN, and logistic regression.",
        measures,
    )


def separable(subject: Subject, root: str, queries: str | None, num_workers: int, seed: int) -> Part:
    """A linear classifier, as dino-lightning linear trains it."""
    options = {"image_size": subject.image_size, **subject.colours, "compare": subject.compare}
    with _hushed():
        found = linear(subject.checkpoint, root, queries, num_workers=num_workers, seed=seed, **options)
    values = {name: max(standing.last[0] for standing in rates.values()) for name, rates in found.items()}
    return Part(
        "Does a line part the classes?",
        "The best of linear classifiers of several learning rates on frozen features (dino-lightning linear).",
        [Measure("linear, top-1", values)],
    )


def groups(seen: Seen, subject: Subject, seed: int) -> Part:
    """k-means, and how it agrees with the classes."""
    k = min(len(seen.classes) or _GROUPS, len(seen.paths))
    chosen = seen.spread_out(_CLUSTERED)
    features, labels = seen.features[TRAINED][chosen].cpu(), seen.labels[chosen].cpu()
    assigned, centres = kmeans(features, k, seed)
    measures = []
    if seen.classes:
        for name, measure in (("purity", purity), ("mutual information", nmi)):
            values = {TRAINED: measure(assigned, labels)}
            if UNTRAINED in seen.features:
                values[UNTRAINED] = measure(kmeans(seen.features[UNTRAINED][chosen].cpu(), k, seed)[0], labels)
            measures.append(Measure(f"{name} of {k} clusters (by chance {100 * by_chance(measure, assigned, labels):.1f})", values))
    drawn = draw_clusters(features, [seen.paths[i] for i in chosen], subject.shown._asdict(), assigned, centres, seen.classes, labels)
    return Part(
        "Which groups are there?",
        "Clusters of k-means: of each the images nearest to its centre, and the classes of its images.",
        measures,
        [page.picture(drawn, "clusters")],
    )


def alike(bank: Seen, queries: Seen, subject: Subject) -> Part:
    """Queries, and what is nearest to them."""
    asked = queries.spread_out(_ASKED)
    similarities, order = nearest(bank.features[TRAINED], queries.features[TRAINED][asked], min(_NEIGHBORS + 1, len(bank.paths)))
    found = {}
    for i, cosines, places in zip(asked, similarities.tolist(), order.tolist()):
        others = [(bank.paths[place], cosine) for place, cosine in zip(places, cosines) if bank.paths[place] != queries.paths[i]]
        found[queries.paths[i]] = others[:_NEIGHBORS]
    drawn = draw_neighbors(found, bank.paths, subject.shown._asdict())
    return Part("What looks alike to it?", "Images, and those with the most similar features.", (), [page.picture(drawn, "nearest images")])


def looks(seen: Seen, subject: Subject) -> Part | None:
    """What the network looks at, and what it tells apart within images."""
    chosen = [seen.paths[i] for i in seen.spread_out(_LOOKED_AT)]
    with tempfile.TemporaryDirectory() as folder, _hushed():
        try:
            drawn = attention(*chosen, checkpoint=subject.checkpoint, output=folder, compare=subject.compare, **subject.colours)
        except NoSpatialMapError:
            return None
        pictures = [Image.open(path).convert("RGB") for path in drawn]
        components = Image.open(Path(folder) / "pca.png").convert("RGB")
    blocks = [page.picture(image, f"what it looks at in {os.path.basename(path)}") for image, path in zip(pictures, chosen)]
    return Part(
        "What does it look at?",
        "Where the last block's class token looks (of a CNN, the norm of its features), and the principal components of the features of places as colours.",
        (),
        [*blocks, page.picture(components, "principal components of the features of places")],
    )


def mapped(seen: Seen, subject: Subject, seed: int) -> Part:
    """The images as points."""
    chosen = seen.spread_out(_MAPPED)
    features = seen.features[TRAINED][chosen]
    maps = {"PCA": plane_pca(features).tolist()}
    if has_umap() and len(chosen) > 3:
        maps = {"UMAP": plane_umap(features, seed).tolist(), **maps}
    thumbnails = Thumbnails(subject.shown.size, subject.shown.in_chans, lines=0)
    pictures = [Image.fromarray(thumbnails.draw(seen.paths[i], "")).resize((_SIDE, _SIDE)) for i in chosen]
    shown = page.Points(maps, [os.path.basename(seen.paths[i]) for i in chosen], seen.labels[chosen].tolist(), seen.classes, pictures)
    few = f"{len(chosen)} of the {len(seen.paths)} images" if len(chosen) < len(seen.paths) else f"The {len(chosen)} images"
    return Part(
        "Where do the images lie?",
        f"{few} as points, by {' or '.join(maps)} of their features. Point at one to see it; click on a class to hide it.",
        (),
        [page.scatter(shown)],
    )


def buildings(subject: Subject, root: str) -> Part:
    """Revisited Oxford or Paris."""
    with _hushed():
        found = retrieval(subject.checkpoint, root, compare=subject.compare, **subject.colours)
    measures = [Measure(f"{setting}, mAP", {name: found[name][setting][0] for name in found}) for setting in found[TRAINED]]
    return Part("Does it find the same building?", "Mean average precision of revisited Oxford or Paris (dino-lightning retrieval).", measures)


def copied(subject: Subject, root: str) -> Part:
    """Copydays."""
    with _hushed():
        found = copies(subject.checkpoint, root, compare=subject.compare, **subject.colours)
    measures = [Measure(f"{kind}, mAP", {name: found[name][kind] for name in found}) for kind in found[TRAINED]]
    return Part("Does it find copies?", "Mean average precision of the originals of edited copies (dino-lightning copies).", measures)


def followed(subject: Subject, root: str) -> Part:
    """DAVIS."""
    with tempfile.TemporaryDirectory() as folder, _hushed():
        found = track(root, checkpoint=subject.checkpoint, output=folder, compare=subject.compare, **subject.colours)
    measures = [Measure(name, {network: values[i] for network, values in found.items()}) for i, name in enumerate(("J, region", "F, contour"))]
    measures.append(Measure("J&F", {network: sum(values) / 2 for network, values in found.items()}))
    return Part("Can objects be followed?", "Objects of a film's first frame, followed by features of places (dino-lightning track).", measures)


def told_apart(subject: Subject, root: str) -> Part:
    """Images with masks."""
    with _hushed():
        found = segment(subject.checkpoint, root, compare=subject.compare, **subject.colours)
    return Part(
        "Does it know what the pixels show?",
        "Mean intersection over union of a linear classifier of the features of places (dino-lightning segment).",
        [Measure("mIoU", {name: values[0] for name, values in found.items()})],
    )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what a tool prints; its progress and its warnings stay."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
