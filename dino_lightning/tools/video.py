"""``dino-lightning video``: the attention of a checkpoint on the frames of a film."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dino_lightning.data.frames import open_frames
from dino_lightning.data.geometry import whole_view
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.attention import mass_mask
from dino_lightning.evaluation.spatial import SpatialMaps, side_multiple, spatial_maps
from dino_lightning.pictures import cut_out, framed, heat_map, rgb, sheet
from dino_lightning.tools.checkpoint import images_of, load_module
from dino_lightning.tools.films import FOLDER_RATE, check_film, film_writer

_MEMORY = 25  # frames over which the range of the colours is averaged
_SMALLEST = 240  # pixels of the longer side of a frame in the film


def video(
    *frames: str,
    checkpoint: str,
    output: str = "attention_video",
    image_size: int | None = None,
    head: int | None = None,
    mass: float = 0.6,
    fps: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> int:
    """Draws what the last block looks at in each frame of a film: frame, heat map, and the patches that hold most of it.

    Of a CNN it shows the norm of the last feature map instead. The colours of the heat maps run from the least to the
    greatest value of a frame, both averaged over about the last 25 frames, so that they do not flicker. One frame is in
    memory at a time.

    Args:
        frames: one folder of images, shown in the order of the numbers in their names, or one video file (with PyAV
            installed: pip install av). Unreadable images are named in the log and left out.
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        output: a name that ends with .mp4 for a film (with PyAV installed), overwritten if it exists; else a new or empty
            folder for a PNG of each frame.
        image_size: pixels of the frames' shorter side; by default twice that of the training's global crops. The finer the
            patches, the sharper the maps.
        head: number of the head to show, from 1; by default the mean of all.
        mass: share of the attention that the shown patches hold.
        fps: frames per second of an .mp4; by default those of the video file, or 25 for a folder.
        mean: per channel; by default the training's.
        std: per channel, likewise.

    Returns:
        The number of frames drawn.
    """
    if len(frames) != 1:
        raise ValueError(f"give one folder of frames or one video file, got {len(frames)}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if not 0 < mass <= 1:
        raise ValueError(f"mass must lie in (0, 1], got {mass}: it is a share, such as 0.6")
    if fps is not None and not 0.1 <= fps <= 1000:
        raise ValueError(f"fps must lie between 0.1 and 1000 frames per second, got {fps}")
    source = open_frames(frames[0])
    check_film(Path(output), Path(frames[0]))
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    size = 2 * min(shown.size) if image_size is None else image_size
    backbone = module.evaluated.backbone

    def views() -> Iterator[tuple[Tensor, SpatialMaps]]:
        for pixels in tqdm(source.read(shown.in_chans), desc="video", total=source.count):
            image = whole_view(pixels, size, side_multiple(backbone))
            yield image, spatial_maps(backbone, normalize(image[None].to(module.device), shown.mean, shown.std))

    pages = _pages(views(), head, mass)
    first = next(pages, None)
    if first is None:
        raise ValueError(f"none of the frames of {frames[0]} can be read; the log says why")
    drawn = 0
    with film_writer(Path(output), first.size, fps or source.rate or FOLDER_RATE) as write:
        for page in itertools.chain([first], pages):
            write(page)
            drawn += 1
    print(f"{drawn} frames in {output}")
    return drawn


def _pages(views: Iterable[tuple[Tensor, SpatialMaps]], head: int | None, mass: float) -> Iterator[Image.Image]:
    """A picture of each view, an image uint8 (C, H, W) and its maps; all of one size, that of the first."""
    span, cell = _SteadySpan(), None
    for image, (maps, names, what) in views:
        shown, heading = _choose(maps[0].cpu(), names, what, head)
        cell = cell or _cell(*image.shape[1:])
        row = [rgb(image), heat_map(image, shown, span.follow(shown)), cut_out(image, mass_mask(shown, mass))]
        headings = ["frame", heading, f"patches that hold\n{mass:.0%} of it"]
        yield sheet([[framed(colors, cell) for colors in row]], headings, cell=cell)


class _SteadySpan:
    """The least and the greatest value of maps, averaged over about the last ``_MEMORY`` of them."""

    def __init__(self) -> None:
        self._seen = 0
        self._low = self._high = 0.0

    def follow(self, values: Tensor) -> tuple[float, float]:
        self._seen = min(self._seen + 1, _MEMORY)
        self._low += (values.min().item() - self._low) / self._seen
        self._high += (values.max().item() - self._high) / self._seen
        return self._low, self._high


def _choose(maps: Tensor, names: list[str], what: str, head: int | None) -> tuple[Tensor, str]:
    """Of the maps (M, h, w) the one to show, and how to call it."""
    if head is None:
        return maps.mean(dim=0), f"attention, mean\nof {len(maps)} heads" if len(maps) > 1 else names[0]
    if not 1 <= head <= len(maps):
        raise ValueError(f"head must lie between 1 and {len(maps)} for this checkpoint, which shows {what}, got {head}")
    return maps[head - 1], f"attention,\n{names[head - 1]}" if len(maps) > 1 else names[0]


def _cell(height: int, width: int) -> tuple[int, int]:
    scale = max(1.0, _SMALLEST / max(height, width))
    return round(height * scale), round(width * scale)
