"""``dino-lightning attention``: pictures of what the heads of a checkpoint look at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dino_lightning.backbones import VisionTransformer
from dino_lightning.datasets import ImageFolder, read_image
from dino_lightning.evaluation.attention import best_head_iou, cls_attention, mass_mask
from dino_lightning.multicrop import whole_view
from dino_lightning.painting import IMAGENET_MEAN, IMAGENET_STD, channel_numbers, normalize
from dino_lightning.pictures import attention_sheet
from dino_lightning.tools.checkpoint import load_module, training_size


def attention(
    *images: str,
    checkpoint: str,
    output: str = "attention",
    image_size: int | None = None,
    mass: float = 0.6,
    masks: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> dict[str, float | None]:
    """Draws what each head of the last block looks at: heat maps over the image, and the patches that hold most of it.

    Args:
        images: image files, and folders of them.
        checkpoint: a checkpoint of dino-lightning fit, with a ViT of this package.
        output: folder of the pictures, one for each image.
        image_size: pixels of the images' shorter side; by default twice that of the training's global crops, as in the
            paper's figures. The finer the patches, the sharper the maps.
        mass: share of a head's attention that its mask holds.
        masks: folder with a mask for each image, of the same name, not 0 where the object is: also gives the overlap of the
            best head's mask with it (intersection over union, figure 4 of the paper).
        mean: per channel, as in the training; by default ImageNet's, or 0.5 for other channel counts.
        std: per channel, likewise.

    Returns:
        For each picture the best head's overlap, None without masks.
    """
    files = [file for image in images for file in _files(image)]
    truths = [_mask_of(file, masks) if masks else None for file in files]
    module = load_module(checkpoint)
    backbone, in_chans = module.teacher.backbone, module.options["in_chans"]
    if not isinstance(backbone, VisionTransformer):
        raise TypeError(f"attention needs a ViT of this package, but {checkpoint} holds a {type(backbone).__name__}")
    mean = channel_numbers("mean", mean, IMAGENET_MEAN, in_chans)
    std = channel_numbers("std", std, IMAGENET_STD, in_chans)
    size = image_size or 2 * training_size(module)
    Path(output).mkdir(parents=True, exist_ok=True)
    overlaps: dict[str, float | None] = {}
    for file, truth in zip(tqdm(files, desc="attention"), truths):
        image = whole_view(read_image(file, in_chans), size, backbone.patch_size)
        maps = cls_attention(backbone, normalize(image[None].to(module.device), mean, std)).cpu()
        overlap = None if truth is None else best_head_iou(maps, _read_mask(truth)[None], mass).item()
        caption = file.name if overlap is None else f"{file.name}\nIoU {overlap:.2f}"
        title = f"{image.shape[1]}×{image.shape[2]} pixels; below: the patches that hold {mass:.0%} of a head's attention"
        picture = attention_sheet(image[None], maps, mass_mask(maps, mass), [caption], title)
        picture.save(path := _free(Path(output), file.stem, overlaps))
        overlaps[str(path)] = overlap
    print(f"{len(overlaps)} pictures in {output}")
    if masks:
        print(f"overlap (IoU) of the best head's mask with the true one: {np.mean(list(overlaps.values())):.3f}")
    return overlaps


def _files(image: str) -> list[Path]:
    if Path(image).is_dir():
        folder = ImageFolder(image)
        return [Path(folder.path(i)) for i in range(len(folder))]
    if not Path(image).is_file():
        raise FileNotFoundError(f"there is no image {image!r}")
    return [Path(image)]


def _mask_of(image: Path, masks: str) -> Path:
    found = sorted(Path(masks).glob(f"{image.stem}.*"))
    if not found:
        raise FileNotFoundError(f"there is no mask {image.stem}.* in {masks} for {image}")
    return found[0]


def _read_mask(path: Path) -> Tensor:
    """bool (H, W)."""
    image = Image.open(path)
    levels = np.asarray(image)
    mask = levels > 0 if levels.ndim == 2 else np.asarray(image.convert("RGB")).any(axis=-1)
    if not mask.any():
        raise ValueError(f"the mask {path} marks nothing")
    return torch.from_numpy(mask)


def _free(folder: Path, stem: str, taken: dict[str, float | None]) -> Path:
    """Images of the same name from several folders get numbers."""
    names = (f"{stem}.png" if n == 1 else f"{stem}_{n}.png" for n in range(1, len(taken) + 2))
    return next(folder / name for name in names if str(folder / name) not in taken)
