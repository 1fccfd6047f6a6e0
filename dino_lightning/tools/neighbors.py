"""``dino-lightning neighbors``: the images whose features are most similar to those of others."""

import csv
import os
from pathlib import Path

import torch
from PIL import Image

from dino_lightning.data import ImageFiles
from dino_lightning.evaluation.features import features_with_paths
from dino_lightning.evaluation.neighbors import nearest
from dino_lightning.pictures import sheet
from dino_lightning.tools.checkpoint import load_module, weights_hash
from dino_lightning.tools.feature_folder import read_features
from dino_lightning.tools.thumbnails import ShortNames, Thumbnails

_MOST_QUERIES = 100  # a sheet of more is no picture to look at


def neighbors(*queries: str, features: str, checkpoint: str, k: int = 10, output: str = "neighbors") -> dict[str, list[tuple[str, float]]]:
    """Finds and draws the images nearest to others by the cosine of their features.

    A query that stands among the images itself is not its own neighbour: it is left out of its row.

    Args:
        queries: image files, and folders of them, at most 100 images. An unreadable one is named in the log and left out.
        features: folder of dino-lightning extract, with the images to search in.
        checkpoint: the checkpoint that these features are of.
        k: neighbours of each query.
        output: folder of neighbors.png, a row for each query, and neighbors.csv (query, rank, path, similarity).

    Returns:
        For each query's path (path, cosine similarity) of its neighbours, the nearest first.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    bank, paths, facts = read_features(features)
    source = ImageFiles(queries, facts["in_chans"])
    if len(source) > _MOST_QUERIES:
        raise ValueError(f"neighbors draws a row for each query, at most {_MOST_QUERIES}, got {len(source)}; name fewer images")
    module = load_module(checkpoint)
    if weights_hash(module) != facts["weights_sha256"]:
        raise ValueError(
            f"{features} is not of the weights of {checkpoint} but of {facts['checkpoint']}: features of different networks "
            "cannot be compared; name that one, or extract anew"
        )
    views = {name: facts[name] for name in ("in_chans", "mean", "std")}
    batches = features_with_paths(module, source, size=tuple(facts["size"]), **views, device=module.device)
    readable = [(some, names) for some, names in batches if some is not None]
    if not readable:
        raise ValueError(f"none of the {len(source)} queries could be read; the log says why")
    vectors = torch.cat([some for some, _ in readable])
    similarities, indices = nearest(bank, vectors, min(k + 1, len(paths)))  # one more: the query itself is left out
    found = {}
    for query, cosines, where in zip((name for _, names in readable for name in names), similarities.tolist(), indices.tolist()):
        others = [(paths[i], cosine) for i, cosine in zip(where, cosines) if not _same(paths[i], query)]
        found[query] = others[:k]
    Path(output).mkdir(parents=True, exist_ok=True)
    _write(Path(output) / "neighbors.csv", found)
    draw_neighbors(found, paths, facts).save(Path(output) / "neighbors.png")
    print(f"the neighbours of {len(found)} images among {len(paths)}: neighbors.png and neighbors.csv in {output}")
    return found


def _same(path: str, query: str) -> bool:
    return path == query or os.path.realpath(path) == os.path.realpath(query)


def _write(path: Path, found: dict[str, list[tuple[str, float]]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["query", "rank", "path", "similarity"])
        for query, others in found.items():
            table.writerows([query, rank, name, f"{cosine:.6f}"] for rank, (name, cosine) in enumerate(others, start=1))


def draw_neighbors(found: dict[str, list[tuple[str, float]]], paths: list[str], facts: dict) -> Image.Image:
    """A row for each query: (path, cosine similarity) of its neighbours. ``facts`` as of ``draw_clusters``, ``paths`` of all images."""
    thumbnails, shown = Thumbnails(facts["size"], facts["in_chans"], lines=4), ShortNames(paths)
    columns = max(len(others) for others in found.values())
    rows = []
    for query, others in found.items():
        row = [thumbnails.draw(query, f"query\n{os.path.basename(query)}")]
        row += [thumbnails.draw(name, f"{cosine:.4f}\n{shown(name)}") for name, cosine in others]
        rows.append(row + [""] * (1 + columns - len(row)))
    title = f"the most similar of {len(paths)} images (cosine of the features), without the query itself"
    return sheet(rows, ["query", *map(str, range(1, 1 + columns))], cell=thumbnails.cell(), title=title)
