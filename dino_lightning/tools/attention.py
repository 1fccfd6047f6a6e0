"""``dino-lightning attention``: pictures of what a checkpoint looks at and tells apart."""

import glob
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from dino_lightning.data import ImageFolder, UnreadableImage, read_image
from dino_lightning.data.geometry import trim, whole_view
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.attention import best_head_iou, mass_mask
from dino_lightning.evaluation.spatial import side_multiple, spatial_features, spatial_maps
from dino_lightning.pictures import attention_sheet, pca_sheet
from dino_lightning.tools.checkpoint import images_of, load_module, untrained
from dino_lightning.tools.masks import read_mask

log = logging.getLogger(__name__)

_MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")  # lossless: JPEG's ringing marks what is no object
_SIGNATURE = "dino-lightning attention"  # tells its pca.png from an image of this name


def attention(
    *images: str,
    checkpoint: str,
    output: str = "attention",
    image_size: int | None = None,
    mass: float = 0.6,
    pca: int = 16,
    masks: str | None = None,
    compare: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> dict[str, float | None]:
    """Draws what each head of the last block looks at: heat maps over the image, and the patches that hold most of it.

    Of a CNN it draws the norm of the last feature map instead. It also draws the principal components of the patch features
    (of a CNN, of its last feature map) as colours: places with similar features look similar.

    Args:
        images: image files, and folders of them. An unreadable one is named in the log and left out.
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        output: folder of the pictures: NAME_attention.png for each image, and pca.png.
        image_size: pixels of the images' shorter side; by default twice that of the training's global crops, as in the
            paper's figures. The finer the patches, the sharper the maps.
        mass: share of a head's attention that its mask holds.
        pca: number of images in pca.png, the first ones; 0 for none.
        masks: folder with a mask for each image, of the same name (below it as the image below its folder), size and a
            lossless format with one channel, not 0 where the object is: also gives the overlap of the best head's mask with
            it (intersection over union, figure 4 of the paper).
        compare: draw below what the same network looks at without training.
        mean: per channel; by default the training's.
        std: per channel, likewise.

    Returns:
        For each picture the best head's overlap, None without masks.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if not 0 < mass <= 1:
        raise ValueError(f"mass must lie in (0, 1], got {mass}: it is a share, such as 0.6")
    if pca < 0:
        raise ValueError(f"pca must be a number of images, 0 for no pca.png, got {pca}")
    files = [file for image in images for file in _files(image, Path(output))]  # (path, name)
    truths = [_find_mask(Path(masks), name) for _, name in files] if masks else [None] * len(files)
    pca_path = Path(output) / "pca.png"
    if pca and pca_path.exists() and not _is_ours(pca_path):
        raise FileExistsError(f"{pca_path} is not a picture of this command, which would overwrite it; choose another output")
    module = load_module(checkpoint)
    backbone, shown = module.evaluated.backbone, images_of(module, image_size, mean, std)
    size = 2 * min(shown.size) if image_size is None else image_size
    networks = [backbone, untrained(module)] if compare else [backbone]
    overlaps: dict[str, float | None] = {}
    pca_images: list[Tensor] = []
    pca_features: list[Tensor] = []
    for (file, name), truth in zip(tqdm(files, desc="attention"), truths):
        try:
            pixels = read_image(file, shown.in_chans)
        except UnreadableImage as error:
            log.warning("left out: %s", error)
            continue
        overlap, caption = None, name
        image = whole_view(pixels, size, side_multiple(backbone))
        network_input = normalize(image[None].to(module.device), shown.mean, shown.std)
        drawn = [spatial_maps(network, network_input) for network in networks]
        maps = torch.cat([one.maps.cpu() for one in drawn])  # (networks, heads, h, w)
        if truth is not None:
            overlap = best_head_iou(maps[:1], _marked(truth, pixels.shape[:2])[None], mass).item()
            caption = f"{name}\nIoU {overlap:.2f}" + "\n(best head)" * (len(drawn[0].names) > 1)
        title = f"{image.shape[1]} by {image.shape[2]} pixels; masks: the patches that hold {mass:.0%} of {drawn[0].what}"
        path = _free(Path(output), Path(name).stem, overlaps)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, captions = image.expand(len(maps), -1, -1, -1), [caption, "untrained"][: len(maps)]
        attention_sheet(rows, maps, mass_mask(maps, mass), drawn[0].names, captions, title).save(path)
        overlaps[str(path)] = overlap
        if len(pca_images) < pca:
            pca_images.append(image)
            pca_features.append(spatial_features(backbone, network_input)[0].cpu())
    if pca_images:
        which = f"{len(pca_images)} images" if len(pca_images) == len(overlaps) else f"the first {pca} of {len(overlaps)} images"
        info = PngInfo()
        info.add_text("Software", _SIGNATURE)
        pca_sheet(pca_images, pca_features, which).save(pca_path, pnginfo=info)
    print(f"{len(overlaps)} picture{'s' * (len(overlaps) != 1)} in {output}" + (f", and {pca_path}" if pca_images else ""))
    if masks and overlaps:
        print(f"overlap (IoU) of the best head's mask with the true one: {np.mean(list(overlaps.values())):.3f}")
    return overlaps


def _files(image: str, output: Path) -> list[tuple[Path, str]]:
    """(path, name) of an image, or of all in a folder but those that this command wrote: names are relative to the folder."""
    if Path(image).is_dir():
        folder = ImageFolder(image)
        paths = [Path(folder.path(i)) for i in range(len(folder))]
        drawn = set(output.resolve().glob("*_attention*.png"))
        drawn |= {path for path in output.resolve().glob("pca.png") if _is_ours(path)}
        return [(path, str(path.relative_to(folder.root))) for path in paths if path.resolve() not in drawn]
    if not Path(image).is_file():
        raise FileNotFoundError(f"there is no image {image!r}")
    return [(Path(image), Path(image).name)]


def _is_ours(picture: Path) -> bool:
    try:
        with Image.open(picture) as opened:
            return opened.info.get("Software") == _SIGNATURE
    except OSError:
        return False


def _find_mask(masks: Path, name: str) -> Path:
    stem = str(Path(name).with_suffix(""))
    found = sorted(p for p in masks.glob(f"{glob.escape(stem)}.*") if p.suffix.lower() in _MASK_EXTENSIONS)
    if not found:
        raise FileNotFoundError(f"there is no mask {stem} ({', '.join(_MASK_EXTENSIONS)}) in {masks}")
    return found[0]


def _marked(path: Path, size: tuple[int, int]) -> Tensor:
    """bool (H, W), of the part of the image that ``whole_view`` shows."""
    mask = read_mask(path, size) > 0
    if not mask.any():
        raise ValueError(f"the mask {path} marks nothing")
    return trim(torch.from_numpy(mask))


def _free(folder: Path, stem: str, taken: dict[str, float | None]) -> Path:
    """Images of the same name from several folders get numbers."""
    numbers = ("" if n == 1 else f"_{n}" for n in range(1, len(taken) + 2))
    paths = (folder / f"{stem}_attention{number}.png" for number in numbers)
    return next(path for path in paths if str(path) not in taken)
