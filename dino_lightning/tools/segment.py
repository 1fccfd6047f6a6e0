"""``dino-lightning segment``: what patch features know of the classes of pixels."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dino_lightning.data import read_image
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.segmentation import Confusion, LinearSegmenter
from dino_lightning.evaluation.spatial import side_multiple, spatial_features
from dino_lightning.evaluation.whole import squeezed
from dino_lightning.listing import list_images
from dino_lightning.tools.checkpoint import Images, images_of, load_module, networks_of
from dino_lightning.tools.masks import read_mask
from dino_lightning.training.randomness import generator

_IGNORED = 255  # in masks of VOC, and of ADE20K once its 0 is that
_ADE = "annotations"  # folder of masks that begin with 1
_FINER = 4  # places of the logits that are trained, for each patch and side


class _Set(NamedTuple):
    """Images with masks of whole numbers; ``shift`` is added to those, modulo 256."""

    train: list[tuple[Path, Path]]
    val: list[tuple[Path, Path]]
    shift: int
    layout: str


def segment(
    checkpoint: str,
    root: str,
    image_size: int | None = None,
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    compare: bool = False,
) -> dict[str, tuple[float, list[float]]]:
    """Trains a linear classifier on frozen patch features and gives the mean intersection over union of the validation images.

    Of Pascal VOC 2012 (``JPEGImages``, ``SegmentationClass``, ``ImageSets/Segmentation/train.txt`` and ``val.txt``), of ADE20K
    (``images/training`` and ``validation``, ``annotations/...``, where 0 does not count), or of ``images/train``, ``images/val``,
    ``masks/train`` and ``masks/val`` with names alike. A mask has one channel or a palette; 255 does not count. The features of the images
    to learn from lie in the temporary folder meanwhile, in half precision (20,000 images at 28×28 patches of a ViT-S/16: 12 GB).

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: of the set.
        image_size: pixels of a square to which images are squeezed; by default twice that of the training's global crops.
        epochs: of the classifier.
        lr: of its AdamW, which ends at 0 by a cosine.
        batch_size: images at a time.
        seed: of the classifier and the order.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        compare: also on the same network untrained.

    Returns:
        For "trained" (and "untrained") the mean IoU, and that of each class (NaN of one that is nowhere in the validation images).

    Raises:
        FileNotFoundError: for a folder of another layout, or an image without a mask.
        ValueError: for masks in which nothing counts, or of another size than their image.
    """
    for name, value in {"epochs": epochs, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    found = _layout(Path(root))
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    multiple = side_multiple(module.evaluated.backbone)
    asked = image_size or 2 * min(shown.size)
    shown = shown._replace(size=(max(multiple, asked // multiple * multiple),) * 2)
    classes = 1 + max(_greatest(_mask(mask, found.shift)) for _, mask in tqdm(found.train + found.val, desc="masks", leave=False))
    if classes < 1:
        raise ValueError(f"the masks of {root} hold nothing but {_IGNORED}, which does not count")
    print(
        f"{found.layout}: {len(found.train)} images to learn from, {len(found.val)} to measure, {classes} classes, {shown.size[0]}×{shown.size[1]} pixels"
    )
    results: dict[str, tuple[float, list[float]]] = {}
    for title, network in networks_of(module, compare).items():
        look = _Look(network, module.device, shown)
        with tempfile.TemporaryDirectory() as scratch:
            classifier = _learned(look, found, classes, Path(scratch), epochs, lr, batch_size, seed, title)
        confusion = Confusion(classes)
        for image, mask in tqdm(found.val, desc=title, leave=False):
            places, size = look.features(image)
            truth = _mask(mask, found.shift, size)
            with torch.no_grad():
                logits = classifier(places[None], size)[0]
            confusion.update(logits.argmax(dim=0).cpu(), torch.from_numpy(truth))
        results[title] = confusion.mean_iou(), confusion.iou().tolist()
        print(f"{title:12}mIoU {100 * results[title][0]:5.1f}")
    return results


class _Look(NamedTuple):
    network: nn.Module
    device: torch.device
    shown: Images

    def features(self, path: Path) -> tuple[Tensor, tuple[int, int]]:
        """(D, h, w) of an image squeezed to the square, and (H, W) of the image."""
        image = read_image(path, self.shown.in_chans)
        pixels = squeezed(image, self.shown.size)
        found = spatial_features(self.network, normalize(pixels[None].to(self.device), self.shown.mean, self.shown.std))[0]
        return found, image.shape[:2]


def _learned(
    look: _Look, found: _Set, classes: int, scratch: Path, epochs: int, lr: float, batch_size: int, seed: int, title: str
) -> LinearSegmenter:
    """The classifier of features that are computed once, in half precision on the disk."""
    features: np.memmap | None = None
    truths = []
    for i, (image, mask) in enumerate(tqdm(found.train, desc=f"{title}: features", leave=False)):
        places, whole = look.features(image)
        if features is None:
            features = np.memmap(scratch / "features", np.float16, "w+", shape=(len(found.train), *places.shape))
            size = tuple(_FINER * side for side in places.shape[1:])
        features[i] = places.cpu().numpy()
        truth = Image.fromarray(_mask(mask, found.shift, whole))
        truths.append(np.array(truth.resize(size[::-1], Image.Resampling.NEAREST)))
    labels = torch.from_numpy(np.stack(truths))  # of one byte: eight times as many would fill the memory
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = LinearSegmenter(features.shape[1], classes).to(look.device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
    steps = epochs * -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in tqdm(range(epochs), desc=f"{title}: classifier", leave=False):
        order = generator(seed, epoch).permutation(len(labels))
        for some in np.split(order, list(range(batch_size, len(order), batch_size))):
            some = np.sort(some)
            batch = torch.from_numpy(features[some]).float().to(look.device)
            truth = labels[some].to(look.device).long()
            loss = F.cross_entropy(classifier(batch, size), truth, ignore_index=_IGNORED, reduction="sum")
            optimizer.zero_grad()
            (loss / (truth != _IGNORED).sum().clamp(min=1)).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def holds_masks(root: Path) -> bool:
    """Whether it holds images with masks in a layout that is known."""
    return _lists(root) is not None or _folders(root) is not None


def _lists(root: Path) -> list[Path] | None:
    """Those of Pascal VOC."""
    files = [root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("train", "val")]
    return files if all(file.is_file() for file in files) else None


def _folders(root: Path) -> tuple[str, list[tuple[Path, Path]]] | None:
    """The name of the folder of masks, and of each split images and masks."""
    for masks, splits in ((_ADE, ("training", "validation")), ("masks", ("train", "val"))):
        pairs = [(root / "images" / split, root / masks / split) for split in splits]
        if all(folder.is_dir() for pair in pairs for folder in pair):
            return masks, pairs
    return None


def _layout(root: Path) -> _Set:
    if lists := _lists(root):
        parts = [
            [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in file.read_text().split()]
            for file in lists
        ]
        return _Set(*map(_all_there, parts), shift=0, layout="Pascal VOC")
    if found := _folders(root):
        name, pairs = found
        parts = [[(images / image, (masks / image).with_suffix(".png")) for image in list_images(images)] for images, masks in pairs]
        shift, layout = (-1, "ADE20K") if name == _ADE else (0, root.name)
        return _Set(*map(_all_there, parts), shift=shift, layout=layout)
    raise FileNotFoundError(
        f"{root} has none of the layouts that are known: ImageSets/Segmentation/train.txt and val.txt (VOC), images/training with "
        "annotations/training (ADE20K), images/train with masks/train, and val beside it"
    )


def _all_there(pairs: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    missing = [path for pair in pairs for path in pair if not path.is_file()]
    if missing or not pairs:
        raise FileNotFoundError(f"{len(missing)} images or masks are missing, such as {missing[0]}" if missing else "there are no images")
    return list(pairs)


def _mask(path: Path, shift: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W) of uint8."""
    mask = read_mask(path, size)
    return np.where(mask == _IGNORED, _IGNORED, mask + np.uint8(shift % 256))  # 0 becomes 255 where it does not count


def _greatest(mask: np.ndarray) -> int:
    counting = mask[mask != _IGNORED]
    return int(counting.max()) if counting.size else -1
