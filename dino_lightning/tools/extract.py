"""``dino-lightning extract``: features of images out of a checkpoint, into files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import dino_lightning
from dino_lightning.backbones import VisionTransformer
from dino_lightning.data import ImageFiles
from dino_lightning.evaluation.features import features_with_paths
from dino_lightning.finished import FEATURES, asked, names_hash, summary
from dino_lightning.methods.base import Method
from dino_lightning.tools.checkpoint import images_of, load_module, weights_hash
from dino_lightning.tools.feature_folder import FeatureFolder
from dino_lightning.tools.parquet import check_pyarrow, write_parquet


def extract(
    *images: str,
    checkpoint: str,
    output: str = "features",
    what: Literal["cls", "patches", "layers"] = "cls",
    n_blocks: int = 4,
    parquet: bool = False,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> None:
    """Writes the teacher's features of images; the same command goes on with an interrupted extraction.

    Args:
        images: image files, and folders of them, flat or nested. An image named twice counts once; an unreadable one is named
            in the log and left out.
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        output: folder of features.npy (float32, a row for each image), paths.txt (line i names the image of row i) and
            features.json (what they are of: hash of the weights, size, mean, ...).
        what: cls, the features (N, D): a ViT's class token after the last block; patches, its patches after the last block
            (N, D, h, w); layers, its class tokens after the last n blocks (N, n, D), oldest first.
        n_blocks: n of layers.
        parquet: also features.parquet, with columns path and feature, of cls (needs pyarrow).
        image_size: pixels of the images' side; by default that of the training's global crops.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        batch_size: images at a time. Another one gives the same features up to rounding.
        num_workers: worker processes.
    """
    if parquet and what != "cls":
        raise ValueError(f"parquet is for what=cls, one vector an image, got what={what}; leave one of the two out")
    if parquet:
        check_pyarrow()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    command = asked(checkpoint, what, n_blocks, image_size, mean, std)  # before the file is read
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    source = ImageFiles(images, shown.in_chans, without=[os.path.abspath(Path(output) / FEATURES)])  # .npy may be an image
    network = _network(module, what, n_blocks, checkpoint)
    views = shown._asdict()
    facts = {
        "checkpoint": os.path.abspath(checkpoint),
        "asked": command,
        "weights_sha256": weights_hash(module),
        "what": what,
        "n_blocks": n_blocks if what == "layers" else None,
        **views,
        "images": len(source),
        "images_sha256": names_hash(source.path(i) for i in range(len(source))),
        "dino_lightning": dino_lightning.__version__,
    }
    with torch.no_grad():
        example = network(torch.zeros(1, shown.in_chans, *shown.size, device=module.device))
    folder = FeatureFolder(output, facts, tuple(example.shape[1:]))
    if not folder.complete:
        batches = features_with_paths(
            network,
            source,
            **views,
            batch_size=batch_size,
            num_workers=num_workers,
            device=module.device,
            start=folder.done,
        )
        with folder, tqdm(total=len(source), initial=folder.done, desc="extract", unit="image") as bar:
            for features, paths in batches:
                count = min(batch_size, len(source) - folder.done)
                folder.append(features, paths, unreadable=count - len(paths))
                bar.update(count)
            if not folder.rows:
                raise ValueError(f"none of the {len(source)} images could be read; the log says why")
            folder.finish()
    if parquet:
        write_parquet(folder.folder)
    print(summary(folder.rows, folder.row_shape, output, folder.unreadable))


def _network(module: Method, what: str, n_blocks: int, checkpoint: str) -> Callable[[Tensor], Tensor]:
    """Normalised images (B, C, H, W) → their features (B, ...)."""
    if what == "cls":
        return module
    vit = module.evaluated.backbone
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"{what} needs a ViT of this package, but {checkpoint} holds a {type(vit).__name__}; it has --what cls")
    if what == "layers":
        if not 1 <= n_blocks <= len(vit.blocks):
            raise ValueError(f"n_blocks must lie between 1 and {len(vit.blocks)}, the depth of the ViT, got {n_blocks}")
        blocks = range(-n_blocks, 0)
        return lambda images: torch.stack([layer.cls for layer in vit.forward_features(images, blocks)], dim=1)
    return lambda images: vit.forward_features(images)[0].patches
