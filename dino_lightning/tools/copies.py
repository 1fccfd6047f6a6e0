"""``dino-lightning copies``: are edited copies of an image found among many others?"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dino_lightning.data import ImageFiles, read_image
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.retrieval import Whitening, rank, score
from dino_lightning.evaluation.whole import Pooling, squeezed, whole_features
from dino_lightning.listing import list_images
from dino_lightning.tools.checkpoint import images_of, load_module, networks_of

_ORIGINAL = "original"
_SIDE = 320  # pixels, as the reference has it
_NAMED_ALIKE = 4  # first letters, that an original's copies have in common with it


def copies(
    checkpoint: str,
    root: str,
    distractors: str | None = None,
    whiten_with: str | None = None,
    centred_whitening: bool = False,
    image_size: int = _SIDE,
    pooling: Pooling = "cls+gem",
    ranked: int = 20,
    trapezoid: bool = True,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    compare: bool = False,
) -> dict[str, dict[str, float]]:
    """Looks for the originals of edited copies by the similarity of their features: Copydays (Douze et al. 2009; section 4.2.1 of the paper).

    Features are the class token beside the generalised mean of the patch tokens (p = 4), of images squeezed to a square, whitened where
    there are images for that.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: folder with ``original/`` and a folder for each kind of copies (``strong/``, ``jpegqual/3/``, ...). A copy's name begins with
            the same four letters as that of its original.
        distractors: folder of images that are no originals, to look among, too.
        whiten_with: folder of other images, whose features whiten.
        centred_whitening: learn the whitening about the mean of those; the reference does so about zero.
        image_size: pixels of the square.
        pooling: cls, the backbone's features; gem, the generalised mean of patch features; cls+gem, one beside the other.
        ranked: images of a ranking that count, the first ones.
        trapezoid: average precision by trapezoids, as the reference has it, or else the usual one.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        compare: also the same network untrained.

    Returns:
        For "trained" (and "untrained") the mean average precision of each kind of copies.

    Raises:
        FileNotFoundError: if there are no originals, or no copies.
        ValueError: for a kind of copies of which no original is there.
    """
    if image_size < 1 or ranked < 1:
        raise ValueError(f"image_size and ranked must be at least 1, got {image_size} and {ranked}")
    folder = Path(root)
    if not (folder / _ORIGINAL).is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder / _ORIGINAL}: root must hold {_ORIGINAL}/ and a folder for each kind of copies"
        )
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)

    def listed(*folders: str | Path) -> list[Path]:
        source = ImageFiles(folders, shown.in_chans)
        return [Path(source.path(i)) for i in range(len(source))]

    originals = listed(folder / _ORIGINAL)
    kinds: dict[str, list[Path]] = {}
    for path in listed(folder):
        kind = path.parent.relative_to(os.path.abspath(folder))
        if kind.parts[:1] != (_ORIGINAL,):
            kinds.setdefault(kind.as_posix(), []).append(path)
    if not kinds:
        raise FileNotFoundError(f"there are no copies in {folder}, only {_ORIGINAL}/")
    bank = originals + (listed(distractors) if distractors else [])
    others = listed(whiten_with) if whiten_with else []
    networks = networks_of(module, compare)
    print(
        f"copies of {len(originals)} originals among {len(bank)} images, {image_size}×{image_size} pixels, {pooling}; mAP of the first {ranked}"
    )
    results: dict[str, dict[str, float]] = {}
    for title, network in networks.items():

        def features(paths: Sequence[Path]) -> Tensor:
            found = []
            for path in tqdm(paths, desc=title, leave=False):
                pixels = squeezed(read_image(path, shown.in_chans), shown.size)
                found.append(whole_features(network, normalize(pixels[None].to(module.device), shown.mean, shown.std), pooling=pooling))
            return torch.cat(found)

        whitening = Whitening(features(others), centred_whitening) if others else None

        def ready(vectors: Tensor) -> Tensor:
            return F.normalize(whitening(vectors) if whitening else vectors, dim=1)

        places = ready(features(bank))
        results[title] = {}
        for kind, paths in sorted(kinds.items()):
            positives = [np.array([i for i, path in enumerate(originals) if _key(path) == _key(copy)], dtype=int) for copy in paths]
            if not any(map(len, positives)):
                raise ValueError(
                    f"no copy in {folder / kind} has the first {_NAMED_ALIKE} letters of an original, such as {originals[0].name}"
                )
            order = rank(places, ready(features(paths)), ranked)
            results[title][kind] = score(order, positives, trapezoid=trapezoid).mean_ap
            alone = sum(not len(found) for found in positives)
            print(
                f"{title:12}{kind:20}{100 * results[title][kind]:6.1f}"
                + (f"   ({alone} copies of no original do not count)" if alone else "")
            )
    return results


def holds_originals(root: Path) -> bool:
    """Whether it holds originals and copies with names alike, as Copydays does."""
    if not (root / _ORIGINAL).is_dir():
        return False
    names = [Path(name) for name in list_images(root)]
    originals = {_key(name) for name in names if name.parts[0] == _ORIGINAL}
    return any(_key(name) in originals for name in names if len(name.parts) > 1 and name.parts[0] != _ORIGINAL)


def _key(path: Path) -> str:
    return path.name[:_NAMED_ALIKE]
