"""Colour jitter, grayscale, blur, solarize and normalise for a batch of uint8 crops, on the device that holds them.

The worker decides, the device paints: a DataLoader worker ships each crop with the few numbers it sampled (one `PAINT`
record), and `paint` is a deterministic function of the two. No decision is read back from the device: the records stay
on the host, so which crops need which operation is known there, and a batch costs three small host-to-device copies.

The reference is torchvision.transforms.functional on PIL images: PIL's ImageEnhance (Blend.c), its L and HSV
conversions (Convert.c), GaussianBlur (BoxBlur.c) and ImageOps.solarize. Against Pillow 13.0 for x86-64, on the CPU, no
level of any operation differs. Tried: all 2**24 colours in one image, under 7 hue shifts, 12 factors each of
brightness, contrast and saturation, gray and solarize; blur of the same colours shuffled, with 9 sigmas from 0.001
to 5.3. The levels pass through no step whose rounding a device may choose (no fused multiply-add, no quotient by a
Python number that CUDA would turn into a product), so a GPU should give the same ones; that has not been tried. A
Pillow built with fused multiply-add (the compiler's choice on other processors) may blend a level within float32
rounding of a whole number to its neighbour. The normalised floats may be off in the last bit on a GPU.

An NVIDIA GPU takes the kernels of ``painting_triton.py``, once they have shown there that their levels are these.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_lightning.data.paint_records import BRIGHTNESS, CONTRAST, HUE, PAINT, SATURATION, box_weights, hue_shifts, hue_table
from dino_lightning.training.late import sent

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Each of the 24 orders is a subsequence of these twelve operations (no shorter sequence has that property), so a batch
# in which every crop has its own order is jittered in twelve groups, and hue, by far the dearest, is in only two.
SCHEDULE = (0, 1, 2, 3, 0, 1, 2, 0, 3, 1, 0, 2)

LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
CPU_PIXELS = 1 << 18


class Step(NamedTuple):
    """An operation that works in place on (n, C, H, W), the crops it applies to, and its numbers: (n,) and (n, k)."""

    operation: Callable[[Tensor, Tensor], None]
    rows: np.ndarray
    numbers: np.ndarray


def paint(crops: Tensor, recipe: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Paint each crop by its record, then normalise: (x / 255 - mean) / std.

    The order is jitter (four operations in the order of recipe["order"], the first entry first; 0 brightness,
    1 contrast, 2 saturation, 3 hue), gray, blur (where blur_sigma > 0), solarize (threshold 128), normalise.

    Args:
        crops: uint8 (N, C, H, W), any device and strides; not modified. With C other than 3 only brightness, contrast
            (its gray level is the mean over all channels) and blur apply; C = 1 equals PIL's mode L.
        recipe: `PAINT` records (N,), on the host.
        mean, std: C numbers each, in units of the full range 0..1.

    Returns:
        float32 (N, C, H, W), contiguous, on the device of `crops`.
    """
    _check(crops, recipe, mean, std)
    if crops.device.type == "cpu":
        return _paint_in_pieces(crops, recipe, mean, std)
    fits = crops.shape[1] == 3 and math.prod(crops.shape[2:]) < 1 << 23 and len(crops) > 0
    if crops.device.type == "cuda" and fits and (kernels := _kernels(crops.device)):
        return kernels(crops, recipe, mean, std)
    return _paint_at_once(crops, recipe, mean, std)


def _paint_at_once(crops: Tensor, recipe: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """For a device that wants few large operations."""
    center, spread = _ship([np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))], np.float32, crops.device)
    image = crops.to(torch.float32, memory_format=torch.contiguous_format)
    _paint(image, recipe)
    return image.div_(255).sub_(center).div_(spread)


def _paint_in_pieces(crops: Tensor, recipe: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """For a CPU, which wants its temporaries in its last cache: five crops of 224, or 28 of 96, that share operations if alike."""
    center, spread = _ship([np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))], np.float32, crops.device)
    image = torch.empty(crops.shape, dtype=torch.float32)
    size = max(1, CPU_PIXELS // math.prod(crops.shape[2:]))
    alike = np.lexsort([recipe["gray"], recipe["blur_sigma"] > 0, *recipe["order"].T, recipe["jitter"]])
    for start in range(0, len(crops), size):
        rows = alike[start : start + size]
        piece = torch.empty(len(rows), *crops.shape[1:])
        for crop, row in zip(piece, rows):
            crop.copy_(crops[row])
        _paint(piece, recipe[rows])
        piece.div_(255).sub_(center)
        for crop, row in zip(piece, rows):
            torch.div(crop, spread, out=image[row])
    return image


@functools.cache
def _kernels(device: torch.device) -> Callable[[Tensor, np.ndarray, Sequence[float], Sequence[float]], Tensor] | None:
    """`painting_triton.paint` if it works on this GPU and gives the levels of this file there, else None and a warning."""
    rng = np.random.default_rng(0)
    recipe = np.zeros(24, PAINT)
    recipe["jitter"], recipe["order"] = True, list(itertools.permutations(range(4)))
    for name in ("brightness", "contrast", "saturation"):
        recipe[name] = rng.uniform(0.5, 1.5, 24)
    recipe["hue"] = rng.uniform(-0.5, 0.5, 24)
    recipe["gray"][::4], recipe["blur_sigma"][::2], recipe["solarize"][::3] = True, rng.uniform(0.1, 3, 12), True
    crops = torch.from_numpy(rng.integers(0, 256, (24, 3, 40, 56), dtype=np.uint8)).to(device)
    try:  # whatever keeps a compiler from its work: no Triton, no C compiler, no room for its cache, a driver that is too old
        from dino_lightning.data.painting_triton import paint as kernels

        painted, expected = (way(crops, recipe, IMAGENET_MEAN, IMAGENET_STD) for way in (kernels, _paint_at_once))
        same = torch.allclose(painted, expected, atol=1e-4)  # a level is 0.017
        reason = "" if same else "their levels differ from PIL's"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if not reason:
        return kernels
    warnings.warn(
        f"crops are painted by some hundred operations instead of nine kernels of Triton, which do not work on {device}: "
        f"{reason}. Results are the same; a step may take longer. Install triton and a C compiler to mend that.",
        stacklevel=2,
    )
    return None


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, C, H, W) -> float32 as `paint` gives it for crops that nothing is painted on."""
    center, spread = _ship([np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))], np.float32, images.device)
    return images.float().div_(255).sub_(center).div_(spread)


def channel_numbers(name: str, values: Sequence[float] | None, imagenet: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """The mean or std of `in_chans` channels: as given, else ImageNet's for three and 0.5 for other counts.

    Raises:
        ValueError: if there is not one number per channel.
    """
    values = tuple(values) if values is not None else imagenet if in_chans == 3 else (0.5,) * in_chans
    if len(values) != in_chans:
        raise ValueError(f"{name} has {len(values)} values {values}, but there are in_chans={in_chans} channels")
    if not all(0 <= value <= 1 for value in values) or (name == "std" and not all(values)):
        raise ValueError(f"{name} must be of levels in [0, 1], a std above 0, got {values}; divide those of 0 to 255 by 255")
    return values


def _paint(image: Tensor, recipe: np.ndarray) -> None:
    """Run every step on its subset of the crops (n, C, H, W), in place: whole levels 0..255.

    They are float32 throughout: every operation leaves whole levels, so uint8 would only add casts.
    """
    steps = list(_steps(recipe, image.shape[1]))
    if not steps:
        return
    numbers = _ship([step.numbers[..., None, None] for step in steps], np.float32, image.device)
    if image.device.type == "cpu":
        for (operation, rows, _), number in zip(steps, numbers):
            starts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]  # of runs of neighbours, which are not copied
            for start, stop in itertools.pairwise(starts):
                operation(image[rows[start] : rows[stop - 1] + 1], number[start:stop])
        return
    indices = _ship([step.rows for step in steps], np.int64, image.device)
    for (operation, _, _), index, number in zip(steps, indices, numbers):
        if len(index) == len(image):
            operation(image, number)
        else:
            subset = image.index_select(0, index)
            operation(subset, number)
            image.index_copy_(0, index, subset)


def _steps(recipe: np.ndarray, channels: int) -> Iterator[Step]:
    """Everything `recipe` (n,) asks for, in an order that suits all its crops; every step has at least one row."""
    yield from _jitter_steps(recipe, channels)
    nothing = np.empty((len(recipe), 0))
    if channels == 3:
        yield from _step(_gray, recipe["gray"], nothing)
    yield from _step(_blur, recipe["blur_sigma"] > 0, box_weights(recipe["blur_sigma"]))
    if channels == 3:
        yield from _step(_solarize, recipe["solarize"], nothing)


def _jitter_steps(recipe: np.ndarray, channels: int) -> Iterator[Step]:
    """Walk `SCHEDULE`; a crop takes part whenever the operation on offer is the next one of its own order."""
    on = recipe["jitter"]
    colour = on & (channels == 3)
    jitter = {
        BRIGHTNESS: (_brightness, recipe["brightness"], on & (recipe["brightness"] != 1)),
        CONTRAST: (_contrast, recipe["contrast"], on & (recipe["contrast"] != 1)),
        SATURATION: (_saturation, recipe["saturation"], colour & (recipe["saturation"] != 1)),
        HUE: (_hue, hue_shifts(recipe["hue"]), colour & (recipe["hue"] != 0)),
    }
    done = np.zeros(len(recipe), np.intp)
    order = np.full((len(recipe), 5), len(jitter))  # the fifth entry stands for "all done": nothing is due
    order[:, :4] = recipe["order"]
    for code in SCHEDULE:
        operation, numbers, wanted = jitter[code]
        due = order[np.arange(len(recipe)), done] == code
        done += due
        yield from _step(operation, due & wanted, numbers[:, None])


def _step(operation: Callable[[Tensor, Tensor], None], wanted: np.ndarray, numbers: np.ndarray) -> Iterator[Step]:
    """The step for the crops with `wanted` (n,), or nothing where no crop has it."""
    rows = np.flatnonzero(wanted)
    if rows.size:
        yield Step(operation, rows, numbers[rows])


def _ship(arrays: Sequence[np.ndarray], dtype: type, device: torch.device) -> list[Tensor]:
    """Move all arrays to the device in one copy; each comes back with its own shape."""
    flat = torch.from_numpy(np.concatenate([np.ravel(array) for array in arrays]).astype(dtype))
    pieces = sent(flat, device).split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays)]


def _brightness(image: Tensor, factor: Tensor) -> None:
    image.mul_(factor).clamp_(0, 255).floor_()


def _contrast(image: Tensor, factor: Tensor) -> None:
    gray = _luma(image) if image.shape[1] == 3 else image
    count = gray[0].numel()
    # Below 2**24 float32 adds whole numbers exactly, in any order.
    total = gray.sum((1, 2, 3), dtype=torch.float32 if 255 * count < 1 << 24 else _wide(image.device), keepdim=True)
    _blend(image, torch.floor_divide(total + count / 2, count).float(), factor)  # int(mean + 0.5)


def _saturation(image: Tensor, factor: Tensor) -> None:
    _blend(image, _luma(image), factor)


def _blend(image: Tensor, base: Tensor, factor: Tensor) -> None:
    """PIL's Image.blend(base, image, factor): float32, one rounding per operation, clipped, truncated."""
    # Three separate kernels and no addcmul or lerp: those may fuse the product and the sum, which rounds otherwise.
    image.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _wide(device: torch.device) -> torch.dtype:
    """What is exact for sums; Apple's GPUs have no float64, and the contrast of large images may be a level off there."""
    return torch.float32 if device.type == "mps" else torch.float64


def _luma(image: Tensor) -> Tensor:
    """PIL's mode L, (n, 3, H, W) -> (n, 1, H, W): (19595 R + 38470 G + 7471 B + 32768) >> 16.

    Exact in float32, because that sum stays below 2**24 and a division by 2**16 rounds nothing.
    """
    red, green, blue = image.split(1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(0.5).floor_()


def _hue(image: Tensor, shift: Tensor) -> None:
    """Add `shift` (0..255, of 256) to PIL's 8-bit hue and convert back; every rounding of PIL's is reproduced."""
    red, green, blue = image.split(1, dim=1)  # (n, 1, H, W), as all planes here
    value = torch.maximum(torch.maximum(red, green), blue)
    span = value - torch.minimum(torch.minimum(red, green), blue)
    hue = _hue_levels(red, green, blue, value, span).add_(shift)
    hue.sub_(hue.mul(1 / 256).floor_(), alpha=256)
    saturation = span.mul_(255).div_(value.clamp(min=1)).floor_()

    # A channel loses value * saturation / 255 in full at and beyond a third of a turn from its own hue, and nothing up
    # to a sixth. In units of 1 / 1530 turn these distances are whole numbers. `fall` below is minus that share * 255.
    own = torch.arange(0, 1530, 510, device=image.device, dtype=image.dtype).view(1, 3, 1, 1)
    fall = torch.sub(hue.mul_(6), own, out=image).abs_().sub_(765).abs_().sub_(510).clamp_(-255, 0)
    fall.mul_(saturation.mul_(value).mul_(1 / 255**2)).add_(value.add_(0.5)).floor_()


def _hue_levels(red: Tensor, green: Tensor, blue: Tensor, value: Tensor, span: Tensor) -> Tensor:
    """PIL's 8-bit hue, (n, 1, H, W) float32, looked up by the largest channel, the difference of the others, and the span."""
    # Sums and products of whole numbers below 2**24, which are exact: `torch.where` takes ten times as long on a CPU.
    not_red, not_green = ((value - channel).clamp_(max=1) for channel in (red, green))  # 0 or 1
    if_red, if_green, if_blue = green - blue, blue - red, red - green
    others = torch.addcmul(if_green, not_green, if_blue.sub_(if_green))
    others = torch.addcmul(if_red, not_red, others.sub_(if_red))
    row = others.add_(not_green.add_(1).mul_(not_red), alpha=511).add_(255)
    index = row.mul_(256).add_(span).int()
    return hue_table(red.device).index_select(0, index.flatten()).view_as(red)


def _gray(image: Tensor, _: Tensor) -> None:
    image.copy_(_luma(image))


def _solarize(image: Tensor, _: Tensor) -> None:
    torch.minimum(image, 255 - image, out=image)  # 255 - x is the smaller one exactly from 128 on


def _blur(image: Tensor, numbers: Tensor) -> None:
    """PIL's GaussianBlur: three box passes along x, then three along y, each rounded to whole levels."""
    bias, *weights = numbers.int().split(1, dim=1)  # (n, 1, 1, 1) each
    # A pass runs along dim 2, where a shift moves whole rows of memory: x comes first, so it is blurred transposed.
    # Levels are centred on zero (-128..127): then PIL's unsigned 32-bit sums fit torch's signed ones.
    levels = _box_passes(image.sub_(128).transpose(2, 3), weights, bias)
    levels = _box_passes(levels.transpose(2, 3), weights, bias)
    torch.add(levels, 128, out=image)


def _box_passes(levels: Tensor, weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Three box filters along dim 2 of (n, C, H, W), as int32; weights[k] is for the pixels k away."""
    n, channels, height, width = levels.shape
    reach = len(weights) - 1
    padded = torch.empty((n, channels, height + 2 * reach, width), dtype=torch.int32, device=levels.device)
    before, inner, after = padded.split([reach, height, reach], dim=2)
    inner.copy_(levels)
    total = torch.empty((n, channels, height, width), dtype=torch.int32, device=levels.device)
    for _ in range(3):
        before.copy_(inner[:, :, :1])  # the edge repeats without end
        after.copy_(inner[:, :, -1:])
        torch.mul(inner, weights[0], out=total)
        for distance in range(1, reach + 1):
            total.addcmul_(padded.narrow(2, reach - distance, height), weights[distance])
            total.addcmul_(padded.narrow(2, reach + distance, height), weights[distance])
        torch.bitwise_right_shift(total.add_(bias), 24, out=inner)
    return inner


def _check(crops: Tensor, recipe: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
    n, shape = len(crops), tuple(crops.shape)
    if crops.dtype != torch.uint8 or len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(
            f"crops must be uint8 (N, C, H, W) with at least one pixel, got {crops.dtype} {shape}: "
            "stack the decoded crops, before any scaling to 0..1"
        )
    if recipe.dtype != PAINT or recipe.shape != (n,):
        raise ValueError(
            f"recipe must hold one PAINT record for each of the {n} crops, got {recipe.dtype} "
            f"{recipe.shape}: make it with np.zeros({n}, PAINT)"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != shape[1]:
            raise ValueError(f"{name} has {len(values)} entries, but the crops have {shape[1]} channels: give one each")
    orders = recipe["order"][recipe["jitter"]]
    for order in orders[(np.sort(orders, axis=1) != np.arange(4)).any(axis=1)]:
        raise ValueError(f"order must be a permutation of 0, 1, 2, 3, got {order.tolist()}: sample a permutation")
    for name in ("brightness", "contrast", "saturation", "hue", "blur_sigma"):
        for number in recipe[name][~np.isfinite(recipe[name])]:
            raise ValueError(f"{name} must be finite, got {number}: to leave it out give 1 (hue, blur_sigma: 0)")
