"""``dino-lightning shrink``: a folder of large images made smaller once, so that training does not wait for their decoding."""

import io
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from dino_lightning.data import UnreadableImage, read_image
from dino_lightning.data.decode import read_file
from dino_lightning.data.workers import cores
from dino_lightning.listing import list_images

_SAMPLE = 16  # images whose reading is timed
_PLAIN = ("L", "RGB", "RGBA", "LA", "CMYK")  # modes that can be resized as they are


def shrink(root: str, output: str, shorter: int = 512, quality: int = 95, num_workers: int = 0) -> None:
    """Copies a folder of images, the large ones made smaller; the same command goes on with an interrupted copy.

    Names and subfolders stay. Images that are small enough, several frames, more than 8 bits and .npy files are copied as they are;
    unreadable ones are named and left out. An image is turned upright as its EXIF says, which is not kept.

    Args:
        root: folder of images, flat or nested.
        output: folder of the copies, outside of root. What is there already stays.
        shorter: largest number of pixels of an image's shorter side. Twice the global crops' size keeps small crops sharp.
        quality: of JPEGs, up to 95.
        num_workers: threads; 0 is one for each core.
    """
    check_sizes(shorter, quality)
    source, target = Path(root).resolve(), Path(output).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"output {output} and root {root} must lie outside of each other")
    names = list_images(str(source))

    def copy(name: str) -> str | None:
        """Why an image was left out; None if its copy is there."""
        if not (target / name).exists():
            try:
                _copy(source / name, target / name, shorter, quality)
            except Exception as error:  # decoders raise anything for damaged bytes
                return f"left out, since it cannot be read: {source / name}: {error}"
        return None

    with ThreadPoolExecutor(num_workers or cores()) as pool:  # Pillow decodes, resizes and encodes outside of the GIL
        for problem in tqdm(pool.map(copy, names), total=len(names), desc="shrink", unit="image", leave=False):
            if problem:
                tqdm.write(problem)
    copied = [name for name in names if (target / name).exists()]
    sizes = [sum((folder / name).stat().st_size for name in copied) / 1e6 for folder in (source, target)]
    print(f"{len(copied)} of {len(names)} images in {output}: {sizes[0]:.1f} MB became {sizes[1]:.1f} MB")
    faster = _speedup(source, target, copied)
    if faster is not None:
        print(f"an image is read {faster:.1f} times as fast as before (the median of {min(_SAMPLE, len(copied))})")


def check_sizes(shorter: int, quality: int) -> None:
    """Raises ValueError for what no image can be made of."""
    if shorter < 1:
        raise ValueError(f"shorter must be at least 1 pixel, got {shorter}")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality must lie between 1 and 95, got {quality}")


def _copy(source: Path, target: Path, shorter: int, quality: int) -> None:
    """A whole file or none, whatever interrupts."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(shrunk(source, shorter, quality))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def shrunk(path: Path, shorter: int, quality: int) -> bytes:
    """What the file of an image of this shorter side holds, in its format, or the file itself where it stays as it is.

    Raises:
        Exception: of any kind, if it cannot be read.
    """
    data = read_file(str(path))
    small = None if path.suffix.lower() == ".npy" else _smaller(data, shorter)
    if small is None:
        return data
    image, form, profile = small
    options = {"quality": quality, "subsampling": "4:2:0"} if form == "JPEG" else {}
    buffer = io.BytesIO()
    image.save(buffer, form, icc_profile=profile, **options)
    return buffer.getvalue()


def _smaller(data: bytes, shorter: int) -> tuple[Image.Image, str | None, bytes | None] | None:
    """The image upright with this shorter side, its format and colour profile; None where it stays as it is."""
    with Image.open(io.BytesIO(data)) as image:
        form, profile = image.format, image.info.get("icc_profile")
        scale = shorter / min(image.size)
        if scale >= 1:
            image.load()  # a damaged one is found
        if scale >= 1 or getattr(image, "n_frames", 1) > 1 or image.mode.startswith(("I", "F")):
            return None
        image.draft(None, tuple(int(2 * side * scale) for side in image.size))  # the decoder of JPEGs does the coarse part
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PLAIN:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        scale = shorter / min(upright.size)
        return upright.resize([max(1, round(side * scale)) for side in upright.size], Image.Resampling.BICUBIC), form, profile


def _speedup(source: Path, target: Path, names: list[str]) -> float | None:
    ratios = []
    for name in names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]:
        seconds = []
        for path in (source / name, target / name):
            start = time.perf_counter()
            try:
                read_image(path)
            except (UnreadableImage, ValueError):  # of other channels, which training names
                continue
            seconds.append(time.perf_counter() - start)
        if len(seconds) == 2:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios) if ratios else None
