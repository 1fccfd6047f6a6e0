"""From a file, or from whatever a Dataset yields, to one uint8 array (H, W, in_chans).

======================= ===================================================================================
what comes in           what comes out
======================= ===================================================================================
EXIF orientation        applied, so that the array is upright
8-bit, in_chans=3       RGB as it is; gray, 1-bit, palette, CMYK, YCbCr, LAB and HSV converted by PIL
8-bit, in_chans=1       gray as it is; everything else to RGB as above, then PIL's "L" (ITU-R 601 luma)
alpha, in_chans=1 or 3  laid over white (RGBA, LA, PA, and palettes or colours marked as transparent)
more than 8 bits        stretched linearly: the image's own minimum becomes 0 and its maximum 255, all
                        channels together; an image of a single value becomes 0; NaN or infinity is an error
float within [0, 1]     times 255, rounded (torchvision's convention), and not stretched
bool                    False is 0 and True is 255
other in_chans          the data must have that many channels and they are kept as they are (RGBA for
                        in_chans=4; palettes are expanded to their colours first)
several frames          the first (GIF, WebP, TIFF); but a TIFF of exactly in_chans > 1 single-band pages of
                        one size is one image with these pages as its channels
array or tensor         numpy is (H, W) or (H, W, C), torch is (H, W) or (C, H, W); C is in_chans, or 1 when
                        in_chans=3 (repeated), or 3 when in_chans=1 (RGB to gray); alpha is not guessed
.npy file               as an array; (C, H, W) also, where only the first axis has the size of C
======================= ===================================================================================

"More than 8 bits" is what PIL opens in mode I;16, I or F, and any array that is neither uint8 nor bool. What PIL does
not open, or not whole, is better saved as .npy: it keeps the top 8 bits of 16-bit *colour* files (PNG, TIFF), and of a
TIFF with bands beside RGB it drops them or takes the fourth for alpha, as the file's tags say.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageSequence, UnidentifiedImageError

from dino_lightning.data import jpeg
from dino_lightning.data.slow_reads import watched

_HIGH_BIT_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_EXPANDED_MODES = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """An image that could not be decoded: ``source`` is its path or a description, ``reason`` says why."""

    def __init__(self, source: str, reason: str) -> None:
        # Both go to Exception's args, from which pickle rebuilds the error on the other side of a worker process.
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.source}: {self.reason}"


class ChannelMismatch(ValueError):
    """The image is intact, but its number of channels is not the one that was asked for."""


def read_image(path: str | os.PathLike[str], in_chans: int = 3, reduction: Callable[[int, int], int] | None = None) -> np.ndarray:
    """Decode a file to uint8 (H, W, in_chans), C-contiguous and writable, by the rule at the top of this module.

    `reduction` says of a height and width by how much (1, 2, 4 or 8) a JPEG may be reduced; its decoder does that
    several times faster than it gives all pixels. Files of other formats keep their size.

    Raises UnreadableImage for a file that cannot be opened, decoded or understood as one image, and ChannelMismatch
    (a ValueError) for an intact image of another number of channels.
    """
    name = os.fspath(path)
    with watched(name):
        return decode_image(read_file(name), name, in_chans, reduction)


def read_file(name: str) -> bytes:
    """What a file of an image holds.

    Raises UnreadableImage where that may take for ever (a pipe, a device) or cannot be.
    """
    with _errors_naming(name):
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise OSError("a pipe, a device or a folder, from which nothing may ever come")
        with open(name, "rb") as file:
            return file.read()


def decode_image(data: bytes, name: str, in_chans: int = 3, reduction: Callable[[int, int], int] | None = None) -> np.ndarray:
    """``read_image`` of what a file of this name holds."""
    with _errors_naming(name):
        if name.lower().endswith(".npy"):
            # Unlike np.load this never takes a zip archive or a pickle for an array.
            return _from_array(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False), in_chans, channel_axes=(-1, 0))
        # PIL gets the bytes rather than the name, by which it maps an uncompressed TIFF to memory, and then scrambles one
        # that its orientation tag turns by a quarter (seen in Pillow 13.0). One read is also faster than its many.
        with Image.open(io.BytesIO(data)) as image:
            pixels = None
            if image.format == "JPEG":
                factor = reduction(image.height, image.width) if reduction else 1
                if factor > 1:
                    image.draft(None, (image.width // factor, image.height // factor))
                else:
                    pixels = jpeg.decode(data, image.mode)
            if pixels is None:
                return _from_pil(image, in_chans)
            return _from_array(_turned(pixels, _orientation(image)), in_chans, channel_axes=(-1,))


def as_array(image: Image.Image | torch.Tensor | np.ndarray, in_chans: int = 3) -> np.ndarray:
    """The same for an image in memory: uint8 (H, W, in_chans), C-contiguous and writable.

    The result shares its memory with an array or tensor that is all of this already. Raises TypeError for another type
    or dtype, ChannelMismatch (a ValueError) for another number of channels, ValueError for another shape, no pixels,
    NaN or infinity, and UnreadableImage for a PIL image that fails to decode (PIL decodes on first use).
    """
    if isinstance(image, Image.Image):
        source = getattr(image, "filename", "") or f"a PIL image of mode {image.mode} and size {image.size}"
        with _errors_naming(source):
            return _from_pil(image, in_chans)
    if isinstance(image, torch.Tensor):
        if image.dtype == torch.bfloat16:  # numpy has no bfloat16
            image = image.float()
        return _from_array(image.numpy(force=True), in_chans, channel_axes=(0,))
    if isinstance(image, np.ndarray):
        return _from_array(image, in_chans, channel_axes=(-1,))
    raise TypeError(
        f"an image must be a PIL image, a torch tensor (C, H, W) or (H, W), or a numpy array (H, W, C) or (H, W), "
        f"not {type(image).__module__}.{type(image).__qualname__}"
    )


@contextmanager
def _errors_naming(source: str) -> Iterator[None]:
    try:
        yield
    except ChannelMismatch as error:
        raise ChannelMismatch(f"{source}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(source, "not an image that PIL can open (save other data as .npy)") from error
    except Exception as error:
        # Decoders raise anything for damaged bytes: fuzzing found nine types, from KeyError to tokenize.TokenError.
        raise UnreadableImage(source, f"{error} ({type(error).__name__})") from error


def _from_pil(image: Image.Image, in_chans: int) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"no pixels: size {image.size}")
    pages = _pages(image, in_chans)
    if pages is not None:
        return _from_array(pages, in_chans, channel_axes=(-1,))
    image = _upright(image)
    if image.mode not in _HIGH_BIT_MODES:
        # np.array and not np.asarray, which here is read-only and which torch.from_numpy would warn about.
        if in_chans == 3:
            return np.array(_rgb(image))
        if in_chans == 1:
            return np.array(_gray(image))[..., None]
    return _from_array(np.array(_expanded(image)), in_chans, channel_axes=(-1,))


def _pages(image: Image.Image, in_chans: int) -> np.ndarray | None:
    """The pages of a TIFF as the channels of one array (H, W, in_chans), or None where the rule has no such case."""
    if image.format != "TIFF" or getattr(image, "n_frames", 1) != in_chans:
        return None
    pages = ImageSequence.all_frames(image)  # upright already: PIL turns a TIFF, and no other format, while it loads
    if len({(page.mode, page.size) for page in pages}) > 1 or pages[0].mode not in _HIGH_BIT_MODES | {"L"}:
        return None
    return np.stack([np.asarray(page) for page in pages], axis=-1)


def _upright(image: Image.Image) -> Image.Image:
    """Like ImageOps.exif_transpose, but without the copy when there is nothing to do and indifferent to bad EXIF."""
    image.load()  # before asking for EXIF: in a PNG it may follow the pixels
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata around intact pixels
        return None


def _turned(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """Upright pixels (H, W, C) of those of a file."""
    if orientation not in _UPRIGHT:
        return pixels
    turned = np.array(Image.fromarray(pixels.squeeze()).transpose(_UPRIGHT[orientation]))
    return turned.reshape(*turned.shape[:2], pixels.shape[2])


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = _expanded(image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    if image.mode == "L" and not image.has_transparency_data:
        return image
    return _rgb(image).convert("L")  # by way of RGB, since PIL has no direct conversion for every mode


def _expanded(image: Image.Image) -> Image.Image:
    """The image with one band per channel: no palette indices and no premultiplied alpha."""
    if image.mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.convert(_EXPANDED_MODES[image.mode]) if image.mode in _EXPANDED_MODES else image


def _from_array(data: np.ndarray, in_chans: int, channel_axes: tuple[int, ...]) -> np.ndarray:
    """Array of any number type, whose channels may lie on ``channel_axes`` (first match wins), to the result."""
    pixels = _eight_bit(_channels_last(data, in_chans, channel_axes))
    if pixels.shape[-1] != in_chans:
        # _channels_last lets through only one gray channel for RGB and three RGB channels for gray.
        rgb_to_gray = in_chans == 1
        pixels = _luma(pixels) if rgb_to_gray else np.repeat(pixels, in_chans, axis=-1)
    return np.require(pixels, requirements=["C", "W"])


def _luma(rgb: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))[..., None]


def _channels_last(data: np.ndarray, in_chans: int, channel_axes: tuple[int, ...]) -> np.ndarray:
    if data.ndim not in (2, 3):
        raise ValueError(f"an image has 2 or 3 axes, this array has the shape {data.shape}")
    if data.ndim == 2:
        data, channel_axes = data[..., None], (-1,)
    for count in {1: (1, 3), 3: (3, 1)}.get(in_chans, (in_chans,)):
        for axis in channel_axes:
            if data.shape[axis] == count:
                return np.moveaxis(data, axis, -1)
    found = min(data.shape[axis] for axis in channel_axes)
    raise ChannelMismatch(
        f"an image of {found} channels (shape {data.shape}) where in_chans={in_chans}: pass in_chans={found} (--data.in_chans {found}), or make "
        f"the image one of {in_chans} channels (numpy arrays are (H, W, C), torch tensors (C, H, W))"
    )


def _eight_bit(data: np.ndarray) -> np.ndarray:
    """Numbers of any type to uint8, by the rows "more than 8 bits", "float within [0, 1]" and "bool" of the rule."""
    if data.dtype.kind not in "buif":
        raise TypeError(f"the values of an image must be bool, integer or float, not {data.dtype}")
    if data.size == 0:
        raise ValueError(f"no pixels: shape {data.shape}")
    if data.dtype == np.uint8:
        return data
    low, high = float(data.min()), float(data.max())
    span = high - low
    if not np.isfinite(span):  # min and max pass NaN on, so that this one number tells about every pixel
        raise ValueError("NaN or infinity among the values")
    if data.dtype.kind == "b" or (data.dtype.kind == "f" and 0 <= low and high <= 1):
        low, span = 0.0, 1.0
    pixels = data.astype(np.float64)  # float32 would lose the low bits of 32-bit integers
    pixels -= low
    pixels *= 255 / span if span else 0.0
    return np.rint(pixels, out=pixels).astype(np.uint8)
