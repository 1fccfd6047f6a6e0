"""Images as the networks of a checkpoint see them, read once for all of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino_lightning.data import ImageFolder
from dino_lightning.evaluation.features import features_with_paths, raw_pixels
from dino_lightning.methods.base import Method
from dino_lightning.tools.checkpoint import Images, untrained

TRAINED, UNTRAINED, RAW = "trained", "untrained", "raw pixels"


class Subject(NamedTuple):
    """What is evaluated; ``normalisation`` are a mean and std that were asked for, else None."""

    checkpoint: str
    module: Method
    shown: Images
    image_size: int | None
    normalisation: dict[str, tuple[float, ...] | None]
    compare: bool


class Seen(NamedTuple):
    """Of each network features (N, D), on the host; N paths; labels (N,), -1 without; the names of the classes, none without; and how many
    images could not be read.
    """

    features: dict[str, Tensor]
    paths: list[str]
    labels: Tensor
    classes: list[str]
    unreadable: int

    def spread_out(self, n: int) -> list[int]:
        """At most n indices, evenly over all images, which lie in the order of their classes."""
        return np.unique(np.linspace(0, len(self.paths) - 1, n).round().astype(int)).tolist()


def see(subject: Subject, source: ImageFolder, labelled: bool, batch_size: int, num_workers: int, progress: str) -> Seen:
    """The readable images of a folder, as the network, the untrained one and raw pixels have them.

    Args:
        subject: says whether to compare.
        source: the images.
        labelled: whether their classes count.
        batch_size: images at a time.
        num_workers: worker processes.
        progress: title of the progress bar.

    Raises:
        ValueError: if none can be read.
    """
    networks: dict[str, Callable[[Tensor], Tensor]] = {TRAINED: subject.module}
    if subject.compare:
        networks = {RAW: raw_pixels, UNTRAINED: untrained(subject.module), **networks}
    found: dict[str, Tensor] = {}
    paths: list[str] = []
    views = {**subject.shown._asdict(), "batch_size": batch_size, "num_workers": num_workers, "device": subject.module.device}

    def keep(images: Tensor) -> Tensor:
        for name, network in networks.items():
            features = network(images).float().cpu()  # those of a million images would fill a GPU
            if name not in found:
                found[name] = torch.empty(len(source), features.shape[1])
            found[name][len(paths) : len(paths) + len(features)] = features
        return images

    with tqdm(total=len(source), desc=progress, leave=False) as bar:
        for _, some in features_with_paths(keep, source, **views):
            paths += some
            bar.update(batch_size)
    if not paths:
        raise ValueError(f"none of the {len(source)} images of {source.root} could be read; the log says why")
    labels = torch.full((len(paths),), -1)
    if labelled:
        of_path = {source.path(i): int(source.labels[i]) for i in range(len(source))}
        labels = torch.tensor([of_path[path] for path in paths])
    features = {name: held[: len(paths)] for name, held in found.items()}
    return Seen(features, paths, labels, source.classes if labelled else [], len(source) - len(paths))
