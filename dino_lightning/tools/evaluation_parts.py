"""The parts of ``dino-lightning evaluate``: each says what its numbers mean, and draws."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from dino_lightning.evaluation import knn_accuracy, nearest
from dino_lightning.evaluation.clusters import by_chance, kmeans, nmi, purity
from dino_lightning.evaluation.embedding import has_umap, plane_pca, plane_umap
from dino_lightning.evaluation.low_shot import low_shot
from dino_lightning.evaluation.spatial import NoSpatialMapError
from dino_lightning.evaluation.spread import feature_std, rank_me
from dino_lightning.tools import page, run_log
from dino_lightning.tools.attention import attention
from dino_lightning.tools.clusters import draw_clusters
from dino_lightning.tools.copies import copies
from dino_lightning.tools.linear import linear
from dino_lightning.tools.neighbors import draw_neighbors
from dino_lightning.tools.retrieval import retrieval
from dino_lightning.tools.scatter import Points, as_map
from dino_lightning.tools.seen import RAW, TRAINED, Seen, Subject
from dino_lightning.tools.segment import segment
from dino_lightning.tools.thumbnails import Thumbnails
from dino_lightning.tools.track import track
from dino_lightning.tools.training import best_of_last, hushed

_LOOKED_AT, _ASKED, _NEIGHBORS = 6, 6, 8  # images in the pictures
_RANKED = 10_000  # features of which rank and spread are computed
_MAPPED, _SIDE = 1500, 48  # points of the map, and pixels of their pictures
_GROUPS, _CLUSTERED = 10, 20_000  # clusters without classes, and images that are clustered
_CURVES = {"val/knn_top1": "k-NN accuracy of the queries against steps", "train/loss": "Loss against steps"}


class Measure(NamedTuple):
    """A line of the table.

    Attributes:
        name: the same for every checkpoint and folder.
        values: of "trained" (and "untrained", "raw pixels"); fractions if they are shown in per cent.
        note: what it is of here.
        margins: half of the values' 95 % intervals, where there are any.
        percent: how it is shown.
    """

    name: str
    values: dict[str, float]
    note: str = ""
    margins: dict[str, float] | None = None
    percent: bool = True


class Part(NamedTuple):
    """``about``: what the numbers and pictures say; ``blocks``: of HTML."""

    title: str
    about: str
    measures: Sequence[Measure] = ()
    blocks: Sequence[str] = ()


def course(subject: Subject) -> Part | None:
    """How the run went, if its log lies where fit writes it."""
    folder = Path(subject.checkpoint).resolve().parent.parent
    told = run_log.curves(folder, tuple(_CURVES)) if (folder / "config.yaml").is_file() else {}
    blocks = []
    for key, what in _CURVES.items():
        if points := told.get(key):
            kept = points[:: max(1, len(points) // 1000)] + points[-1:] if len(points) > 1 else points
            blocks += [f"<h3>{what}</h3>", page.lines([page.Line(key, kept)], what, percent=key.startswith("val/"))]
    about = f"From the log in {folder}. The loss tells little: it also falls while everything collapses."
    return Part("The run", about, (), blocks) if blocks else None


def collapse(seen: Seen) -> Part:
    """How widely the features spread."""
    chosen = seen.spread_out(_RANKED)
    some = {name: features[chosen] for name, features in seen.features.items() if name != RAW}
    ranks = {name: rank_me(features) for name, features in some.items()}
    spread = {name: feature_std(features).item() for name, features in some.items()}
    return Part(
        "Has it collapsed?",
        "The effective rank of the features (RankMe), 1 if all images had the same ones, and their spread over all directions, 0 in that case.",
        [Measure("effective rank", ranks, f"of {some[TRAINED].shape[1]} features", percent=False), Measure("spread", spread)],
    )


def neighbours_vote(bank: Seen, queries: Seen, subject: Subject, k: int) -> Part:
    """k-NN accuracy."""
    k = min(k, len(bank.paths))
    device = subject.module.device
    found = {
        name: knn_accuracy(of.to(device), bank.labels, queries.features[name], queries.labels, k=k) for name, of in bank.features.items()
    }
    measures = [Measure("k-NN, top-1", {name: top1 for name, (top1, _) in found.items()}, f"{k} neighbours")]
    if len(bank.classes) > 5:
        measures.append(Measure("k-NN, top-5", {name: top5 for name, (_, top5) in found.items()}, f"{k} neighbours"))
    frequent = int(bank.labels.bincount().argmax())
    always = (queries.labels == frequent).float().mean().item()
    return Part(
        "Do the nearest have the same class?",
        f"Each query's class is voted for by its {k} nearest images of train/. Always answering {bank.classes[frequent]}, the most "
        f"frequent class of train/, would be right for {100 * always:.1f} % of the queries.",
        measures,
    )


def nearest_of_class(seen: Seen) -> Part | None:
    """Where there are classes, but no queries."""
    if len(seen.paths) < 2:
        return None
    values = {}
    for name, features in seen.features.items():
        _, order = nearest(features, features, 2)
        itself = torch.arange(len(order))
        other = torch.where(order[:, 0] == itself, order[:, 1], order[:, 0])
        values[name] = (seen.labels[other] == seen.labels).float().mean().item()
    return Part(
        "Do the nearest have the same class?",
        "Whether the image nearest to each is of its class. For more, set images aside: folders train/ and val/, both with class folders.",
        [Measure("nearest is of its class", values)],
    )


def few_labels(bank: Seen, queries: Seen, shots: Sequence[float], draws: int, k: int, seed: int) -> Part:
    """k-NN and logistic regression of few labels."""
    found = {
        name: low_shot(of, bank.labels, queries.features[name], queries.labels, shots, draws=draws, k=k, seed=seed)
        for name, of in bank.features.items()
    }
    measures = []
    for i, n in enumerate(shots):
        of_each = {name: results[i] for name, results in found.items()}
        given = f"{100 * n:g} %" if n < 1 else f"{int(n)} a class"
        for kind, called in (("knn", "k-NN"), ("logistic", "logistic")):
            values, margins = ({name: getattr(one, kind + end) for name, one in of_each.items()} for end in ("", "_margin"))
            measures.append(
                Measure(f"{called}, labels: {given}", values, f"{of_each[TRAINED].labels} in all", margins if draws > 1 else None)
            )
    return Part(
        "How far do few labels go?",
        f"k-NN and logistic regression with few labels of train/: means over {draws} draws of the labels"
        + (", and the 95 % intervals of these means over the draws." if draws > 1 else "."),
        measures,
    )


def separable(subject: Subject, root: str, queries: str | None, num_workers: int, seed: int) -> Part:
    """A linear classifier, as dino-lightning linear trains it."""
    options = {"image_size": subject.image_size, **subject.normalisation, "compare": subject.compare}
    with hushed():
        found = linear(subject.checkpoint, root, queries, num_workers=num_workers, seed=seed, **options)
    return Part(
        "Are the classes linearly separable?",
        "The best of linear classifiers of several learning rates on frozen features, chosen by these queries, so slightly optimistic "
        "(dino-lightning linear).",
        [Measure("linear, top-1", {name: best_of_last(rates) for name, rates in found.items()})],
    )


def groups(seen: Seen, subject: Subject, seed: int) -> Part:
    """k-means, and how it agrees with the classes."""
    k = min(len(seen.classes) or _GROUPS, len(seen.paths))
    chosen = seen.spread_out(_CLUSTERED)
    labels = seen.labels[chosen]
    features = {name: of[chosen] for name, of in seen.features.items() if name != RAW}
    found = {name: kmeans(of, k, seed) for name, of in features.items()}
    assigned, centres = found[TRAINED]
    measures = []
    for name, measure in (("cluster purity", purity), ("cluster NMI", nmi)) if seen.classes else ():
        values = {network: measure(clusters, labels) for network, (clusters, _) in found.items()}
        measures.append(Measure(name, values, f"{k} clusters, {100 * by_chance(measure, assigned, labels):.1f} by chance"))
    paths = [seen.paths[i] for i in chosen]
    drawn = draw_clusters(features[TRAINED], paths, subject.shown._asdict(), assigned, centres, seen.classes, labels)
    return Part(
        "Which groups are there?",
        "Clusters of k-means"
        + (", and how they agree with the classes: purity and normalised mutual information." if seen.classes else "."),
        measures,
        [page.picture(drawn, "of each cluster the images nearest to its centre")],
    )


def alike(bank: Seen, queries: Seen, subject: Subject) -> Part:
    """Queries, and what is nearest to them."""
    asked = queries.spread_out(_ASKED)
    count = min(_NEIGHBORS + 1, len(bank.paths))
    similarities, order = nearest(bank.features[TRAINED], queries.features[TRAINED][asked], count)
    found = {}
    for i, cosines, places in zip(asked, similarities.tolist(), order.tolist()):
        others = [(bank.paths[place], cosine) for place, cosine in zip(places, cosines) if bank.paths[place] != queries.paths[i]]
        found[queries.paths[i]] = others[:_NEIGHBORS]
    drawn = draw_neighbors(found, bank.paths, subject.shown._asdict())
    return Part(
        "Which images does it find alike?", "Images, and those with the most similar features.", (), [page.picture(drawn, "nearest images")]
    )


def looks(seen: Seen, subject: Subject) -> Part | None:
    """What the network looks at, and what it tells apart within images."""
    chosen = [seen.paths[i] for i in seen.spread_out(_LOOKED_AT)]
    size = subject.image_size and 2 * subject.image_size
    with tempfile.TemporaryDirectory() as folder:
        with hushed():
            try:
                drawn = attention(
                    *chosen, checkpoint=subject.checkpoint, output=folder, image_size=size, compare=subject.compare, **subject.normalisation
                )
            except NoSpatialMapError:
                return None
        pictures = [Image.open(path).convert("RGB") for path in (*drawn, Path(folder) / "pca.png")]
    names = [f"what it looks at in {os.path.basename(path)}" for path in chosen] + ["principal components of the features of places"]
    return Part(
        "What does it look at?",
        "Where the last block's class token looks (of a CNN, the norm of its features), and the principal components of the features of places as "
        "colours, of images at twice the size that the features above are of.",
        (),
        [page.picture(image, name) for image, name in zip(pictures, names)],
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
    shown = Points(maps, [os.path.basename(seen.paths[i]) for i in chosen], seen.labels[chosen].tolist(), seen.classes, pictures)
    few = f"{len(chosen)} of the {len(seen.paths)} images" if len(chosen) < len(seen.paths) else f"The {len(chosen)} images"
    return Part(
        "Where do the images lie?",
        f"{few} as points, by {' or '.join(maps)} of their features. Point at one to see it; click on a class to hide it.",
        (),
        [as_map(shown)],
    )


def buildings(subject: Subject, root: str) -> Part:
    """Revisited Oxford or Paris."""
    with hushed():
        found = retrieval(subject.checkpoint, root, compare=subject.compare, **subject.normalisation)
    measures = [Measure(f"retrieval {setting}, mAP", {name: found[name][setting][0] for name in found}) for setting in found[TRAINED]]
    about = "Mean average precision of revisited Oxford or Paris, at the reference's sizes (dino-lightning retrieval)."
    return Part("Does it find the same building?", about, measures)


def copied(subject: Subject, root: str) -> Part:
    """Copydays."""
    with hushed():
        found = copies(subject.checkpoint, root, compare=subject.compare, **subject.normalisation)
    measures = [Measure(f"copies {kind}, mAP", {name: found[name][kind] for name in found}) for kind in found[TRAINED]]
    about = "Mean average precision of the originals of edited copies, at 320×320 pixels (dino-lightning copies)."
    return Part("Does it find copies?", about, measures)


def followed(subject: Subject, root: str) -> Part:
    """DAVIS."""
    with tempfile.TemporaryDirectory() as folder, hushed():
        found = track(root, checkpoint=subject.checkpoint, output=folder, compare=subject.compare, **subject.normalisation)
    scores = {"J": 0, "F": 1}
    measures = [Measure(f"tracking, {name}", {network: values[i] for network, values in found.items()}) for name, i in scores.items()]
    measures.append(Measure("tracking, J&F", {network: sum(values) / 2 for network, values in found.items()}))
    about = (
        "Objects of a film's first frame, followed by features of places, at 480 pixels (dino-lightning track): J, region, and F, contour."
    )
    return Part("Can objects be followed?", about, measures)


def told_apart(subject: Subject, root: str) -> Part:
    """Images with masks."""
    size = subject.image_size and 2 * subject.image_size
    with hushed():
        found = segment(subject.checkpoint, root, image_size=size, compare=subject.compare, **subject.normalisation)
    about = "Mean intersection over union of a linear classifier of the features of places, at twice the size (dino-lightning segment)."
    return Part(
        "Does it know what the pixels show?", about, [Measure("segmentation, mIoU", {name: values[0] for name, values in found.items()})]
    )
