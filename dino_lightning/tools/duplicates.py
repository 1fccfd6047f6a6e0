"""``dino-lightning duplicates``: pairs of images that are nearly the same."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_lightning.evaluation.neighbors import near_duplicates, normalized
from dino_lightning.pictures import sheet
from dino_lightning.tools.feature_folder import read_features
from dino_lightning.tools.thumbnails import ShortNames, Thumbnails

_SHOWN, _ACROSS = 24, 3  # pairs in the sheet, and in a row of it
_DRAWN = 10_000  # pairs by which the threshold is judged


def duplicates(features: str, threshold: float = 0.95, output: str = "duplicates") -> list[tuple[str, str, float]]:
    """Lists the pairs of images whose features have at least a given cosine, and draws the most similar ones.

    What cosine means "the same" differs from network to network: the command also says how similar pairs drawn at random are.

    Args:
        features: folder of dino-lightning extract.
        threshold: least cosine similarity of a pair.
        output: folder of duplicates.csv (similarity, path, other), the most similar first, and duplicates.png, the first 24.

    Returns:
        (path, other path, similarity) of each pair, the most similar first.
    """
    vectors, paths, facts = read_features(features)
    by_chance = _random_pairs(vectors) if len(paths) > 1 else (0.0, 0.0)
    print("cosine of pairs drawn at random: median {:.4f}, one in a thousand above {:.4f}".format(*by_chance))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    similarities, pairs = near_duplicates(vectors, threshold, device=device, progress="duplicates")
    found = [(paths[i], paths[j], cosine) for (i, j), cosine in zip(pairs.tolist(), similarities.tolist())]
    Path(output).mkdir(parents=True, exist_ok=True)
    with open(Path(output) / "duplicates.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["similarity", "path", "other"])
        table.writerows([f"{cosine:.6f}", path, other] for path, other, cosine in found)
    picture = Path(output) / "duplicates.png"
    picture.unlink(missing_ok=True)  # of an earlier threshold
    if found:
        title = f"the most similar of {len(found)} pairs with a cosine of at least {threshold}"
        title += f" (of random pairs, one in 1000 is above {by_chance[1]:.4f})"
        _draw(found[:_SHOWN], paths, facts, title).save(picture)
    print(f"pairs with a cosine of at least {threshold}: {len(found)}, among {len(paths)} images; duplicates.csv in {output}")
    if len(found) > len(paths):
        print("more pairs than images: to this network many are as similar without being the same; raise --threshold")
    return found


def _random_pairs(vectors: Tensor) -> tuple[float, float]:
    """Median and 99.9 % quantile of the cosine of two different features."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(len(vectors), (_DRAWN,), generator=generator)
    second = (first + torch.randint(1, len(vectors), (_DRAWN,), generator=generator)) % len(vectors)
    cosines = (normalized(vectors[first]) * normalized(vectors[second])).sum(dim=1)
    middle, high = cosines.quantile(torch.tensor([0.5, 0.999])).tolist()
    return middle, high


def _draw(found: list[tuple[str, str, float]], paths: list[str], facts: dict, title: str) -> Image.Image:
    thumbnails, shown = Thumbnails(facts["size"], facts["in_chans"], lines=4), ShortNames(paths)
    cells = []
    for path, other, cosine in found:
        left, right = thumbnails.draw(path, f"{cosine:.4f}\n{shown(path)}"), thumbnails.draw(other, f"\n{shown(other)}")
        cells.append(np.concatenate([left, np.full_like(left[:, :2], 255), right], axis=1))
    cell, across = cells[0].shape[:2], min(_ACROSS, len(cells))
    cells += [""] * (-len(cells) % across)
    rows = [cells[i : i + across] for i in range(0, len(cells), across)]
    return sheet(rows, [""] * across, cell=cell, title=title)
