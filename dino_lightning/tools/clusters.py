"""``dino-lightning clusters``: groups of similar images."""

import csv
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dino_lightning.evaluation.clusters import by_chance, check_sklearn, kmeans, nmi, purity
from dino_lightning.evaluation.neighbors import nearest
from dino_lightning.pictures import sheet
from dino_lightning.tools.feature_folder import read_features
from dino_lightning.tools.thumbnails import ShortNames, Thumbnails

_SHOWN = 10  # images of each cluster
_MOST_DRAWN = 100  # clusters


def clusters(features: str, k: int = 10, seed: int = 0, output: str = "clusters") -> dict[str, tuple[float, float]]:
    """Groups images by k-means of their L2-normalised features (needs scikit-learn).

    Where the images lie in folders of at least two names, these are taken for classes, and the command says how well the
    clusters agree with them: purity and normalised mutual information, and what random clusters of the same sizes give.

    Args:
        features: folder of dino-lightning extract.
        k: number of clusters.
        seed: of the starts of k-means.
        output: folder of clusters.csv (path, cluster; 0 is the largest) and clusters.png, of each cluster the images nearest
            to its centre.

    Returns:
        (value, value by chance) of "purity" and "nmi"; empty without classes.
    """
    check_sklearn()
    vectors, paths, facts = read_features(features)
    assigned, centres = kmeans(vectors, k, seed)
    Path(output).mkdir(parents=True, exist_ok=True)
    with open(Path(output) / "clusters.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["path", "cluster"])
        table.writerows(zip(paths, assigned.tolist()))
    names, labels = _classes(paths)
    agreement = {}
    if len(names) > 1:
        for name, measure in (("purity", purity), ("nmi", nmi)):
            agreement[name] = measure(assigned, labels), by_chance(measure, assigned, labels)
    draw_clusters(vectors, paths, facts, assigned, centres, names, labels).save(Path(output) / "clusters.png")
    print(f"{len(paths)} images in {k} clusters of {', '.join(map(str, assigned.bincount(minlength=k).tolist()))}")
    print(f"clusters.csv and clusters.png in {output}")
    if agreement:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        print(f"against the {len(names)} folders in which the images lie ({shown}):")
        for name, (value, chance) in agreement.items():
            print(f"  {name:8}{value:.3f}   by chance {chance:.3f}")
    return agreement


def _classes(paths: list[str]) -> tuple[list[str], Tensor]:
    """Names of the folders in which the images lie, and the index of each image's (N,): one class in several splits is one."""
    folders = [os.path.basename(os.path.dirname(path)) for path in paths]
    names = sorted(set(folders))
    index = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([index[folder] for folder in folders])


def draw_clusters(
    vectors: Tensor, paths: list[str], facts: dict, assigned: Tensor, centres: Tensor, names: list[str], labels: Tensor
) -> Image.Image:
    """Of each cluster the images nearest to its centre.

    Args:
        vectors: features (N, D).
        paths: of the N images.
        facts: "size" (H, W) and "in_chans" of the images, as the network sees them.
        assigned: (N,) cluster of each.
        centres: (k, D).
        names: of the classes, if there are at least two.
        labels: (N,) class of each.
    """
    thumbnails, shown = Thumbnails(facts["size"], facts["in_chans"], lines=3), ShortNames(paths)
    rows = []
    for cluster, centre in enumerate(centres[:_MOST_DRAWN]):
        members = (assigned == cluster).nonzero()[:, 0]
        if not len(members):  # fewer different features than clusters
            continue
        text = f"cluster {cluster}\n{len(members)} images"
        if len(names) > 1:
            text += "".join(f"\n{share:.0%} {name}" for name, share in _most_frequent(labels[members], names))
        _, nearby = nearest(vectors[members], centre[None], min(_SHOWN, len(members)))
        chosen = [paths[i] for i in members[nearby[0]].tolist()]
        row = [text, *(thumbnails.draw(path, shown(path)) for path in chosen)]
        rows.append(row + [""] * (1 + _SHOWN - len(row)))
    title = f"{len(paths)} images in {len(centres)} clusters: of each the images nearest to its centre"
    if len(names) > 1:
        title += ", and the folders in which most of its images lie"
    if len(centres) > _MOST_DRAWN:
        title += f" (the largest {_MOST_DRAWN})"
    return sheet(rows, [""] * (1 + _SHOWN), cell=thumbnails.cell(), title=title)


def _most_frequent(labels: Tensor, names: list[str]) -> list[tuple[str, float]]:
    """The three most frequent names, and their shares."""
    counts, order = labels.bincount().sort(descending=True, stable=True)
    return [(names[i], count / len(labels)) for count, i in zip(counts.tolist()[:3], order.tolist()) if count]
