"""Painting on an NVIDIA GPU in nine kernels instead of some hundreds, with the levels of ``painting.py``.

Each crop goes through memory once for all of its colours, once for each pass of its blur, and once to be normalised; an
operation there takes a pass of its own. Levels are whole numbers here, and what PIL rounds in float32 is rounded likewise: no
product is fused with a sum (``enable_fp_fusion``), and quotients are IEEE's. Kernels are compiled at their first use.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_lightning.data.paint_records import BRIGHTNESS, CONTRAST, HUE, SATURATION, box_weights, hue_shifts, hue_table
from dino_lightning.training.late import sent

_BLOCK = 1024  # pixels a program
_NONE = -1  # instead of an operation that a crop does without
# A crop's record for the kernels, int32: four operations, then these (three factors are float32), then the weights of its blur.
_BEFORE, _SHIFT, _GRAY, _SOLARIZE, _BLURRED, _FACTORS, _BIAS, _WEIGHTS = (tl.constexpr(i) for i in (4, 5, 6, 7, 8, 9, 12, 13))
_EXACT = {"num_warps": 4, "enable_fp_fusion": False}


def paint(crops: Tensor, recipe: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """As ``painting.paint``, for crops (N, 3, H, W) with less than 2**23 pixels each."""
    n, _, height, width = crops.shape
    records, taps = _records(recipe)
    numbers = sent(torch.from_numpy(records), crops.device)
    normal = sent(torch.tensor([*mean, *std], dtype=torch.float32), crops.device)
    levels, other = crops.clone(memory_format=torch.contiguous_format), torch.empty(crops.shape, dtype=torch.uint8, device=crops.device)
    sums = torch.zeros(n, dtype=torch.int32, device=crops.device)
    image = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    stride, pixels = records.shape[1], height * width
    blocks = triton.cdiv(pixels, _BLOCK)
    table = hue_table(crops.device)
    if (records[:, _BEFORE] < 4).any():
        _add_up[(n, blocks)](levels, numbers, table, sums, stride, pixels, _BLOCK, **_EXACT)
    _colour[(n, blocks)](levels, numbers, table, sums, stride, pixels, _BLOCK, **_EXACT)
    if taps:
        for step, size in ((1, width), (width, height)):  # along x, then along y: after six passes it is in `levels` again
            for _ in range(3):
                _box[(3 * n, blocks)](levels, other, numbers, stride, pixels, step, size, taps, _BLOCK, **_EXACT)
                levels, other = other, levels
    _finish[(3 * n, blocks)](levels, numbers, normal, image, stride, pixels, _BLOCK, **_EXACT)
    return image


def _records(recipe: np.ndarray) -> tuple[np.ndarray, int]:
    """`PAINT` records (n,) → the kernels' (n, _BIAS + 1 + taps), and how many taps the widest blur has, 0 without any blur."""
    order = recipe["order"].astype(np.int32)
    idle = {BRIGHTNESS: ("brightness", 1), CONTRAST: ("contrast", 1), SATURATION: ("saturation", 1), HUE: ("hue", 0)}
    for operation, (name, nothing) in idle.items():
        order[(order == operation) & (recipe[name] == nothing)[:, None]] = _NONE
    order[~recipe["jitter"]] = _NONE
    contrast = order == CONTRAST
    blurred = recipe["blur_sigma"] > 0
    weights = box_weights(recipe["blur_sigma"])
    records = np.zeros((len(recipe), 12 + weights.shape[1]), np.int32)
    records[:, :4] = order
    records[:, _BEFORE] = np.where(contrast.any(1), contrast.argmax(1), 4)
    records[:, _SHIFT] = hue_shifts(recipe["hue"])
    records[:, _GRAY], records[:, _SOLARIZE], records[:, _BLURRED] = recipe["gray"], recipe["solarize"], blurred
    factors = np.stack([recipe["brightness"], recipe["contrast"], recipe["saturation"]], axis=1)
    records[:, _FACTORS:_BIAS] = np.ascontiguousarray(factors, np.float32).view(np.int32)
    records[:, _BIAS:] = weights
    return records, weights.shape[1] - 1 if blurred.any() else 0


@triton.jit
def _luma(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def _blend(level, base, factor):
    return _level((level - base).to(tl.float32) * factor + base.to(tl.float32))


@triton.jit
def _lose(value, lost, six, own):
    """A channel of `value` whose hue is `own`, beside the pixel's `six`, of 1530: it loses up to `lost` (value · saturation / 255²)."""
    fall = 510 - tl.abs(tl.abs(six - own) - 765)
    fall = -tl.minimum(tl.maximum(fall, 0), 255)
    return (fall.to(tl.float32) * lost + (value.to(tl.float32) + 0.5)).to(tl.int32)


@triton.jit
def _jittered(operation, red, green, blue, record, mean, table):
    """One operation of the colour jitter on the levels of some pixels of one crop."""
    if operation == 0:
        factor = tl.load(record + _FACTORS).to(tl.float32, bitcast=True)
        red, green, blue = _level(red.to(tl.float32) * factor), _level(green.to(tl.float32) * factor), _level(blue.to(tl.float32) * factor)
    elif operation == 1:
        factor = tl.load(record + _FACTORS + 1).to(tl.float32, bitcast=True)
        red, green, blue = _blend(red, mean, factor), _blend(green, mean, factor), _blend(blue, mean, factor)
    elif operation == 2:
        factor = tl.load(record + _FACTORS + 2).to(tl.float32, bitcast=True)
        gray = _luma(red, green, blue)
        red, green, blue = _blend(red, gray, factor), _blend(green, gray, factor), _blend(blue, gray, factor)
    elif operation == 3:
        value = tl.maximum(tl.maximum(red, green), blue)
        span = value - tl.minimum(tl.minimum(red, green), blue)
        largest = tl.where(red == value, 0, tl.where(green == value, 1, 2))
        others = tl.where(largest == 0, green - blue, tl.where(largest == 1, blue - red, red - green))
        hue = tl.load(table + ((largest * 511 + others + 255) * 256 + span)).to(tl.int32)
        six = ((hue + tl.load(record + _SHIFT)) & 255) * 6
        saturation = span * 255 // tl.maximum(value, 1)
        lost = (saturation * value).to(tl.float32) * (1 / 65025)
        red, green, blue = _lose(value, lost, six, 0), _lose(value, lost, six, 510), _lose(value, lost, six, 1020)
    return red, green, blue


@triton.jit
def _loaded(crop, at, inside, pixels):
    red = tl.load(crop + at, inside, 0).to(tl.int32)
    green = tl.load(crop + pixels + at, inside, 0).to(tl.int32)
    blue = tl.load(crop + 2 * pixels + at, inside, 0).to(tl.int32)
    return red, green, blue


@triton.jit
def _add_up(levels, records, table, sums, stride, pixels, BLOCK: tl.constexpr):
    """Adds up the gray levels that a crop has when its contrast is due: (n,)."""
    crop = tl.program_id(0).to(tl.int64)
    record = records + crop * stride
    before = tl.load(record + _BEFORE)
    if before < 4:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < pixels
        red, green, blue = _loaded(levels + crop * 3 * pixels, at, inside, pixels)
        for i in range(before):
            red, green, blue = _jittered(tl.load(record + i), red, green, blue, record, before, table)  # no contrast, no mean
        tl.atomic_add(sums + crop, tl.sum(tl.where(inside, _luma(red, green, blue), 0)))


@triton.jit
def _colour(levels, records, table, sums, stride, pixels, BLOCK: tl.constexpr):
    """Colour jitter and gray, in place."""
    crop = tl.program_id(0).to(tl.int64)
    record = records + crop * stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    start = levels + crop * 3 * pixels
    red, green, blue = _loaded(start, at, inside, pixels)
    mean = ((2 * tl.load(sums + crop).to(tl.int64) + pixels) // (2 * pixels)).to(tl.int32)  # rounded
    for i in range(4):
        red, green, blue = _jittered(tl.load(record + i), red, green, blue, record, mean, table)
    if tl.load(record + _GRAY) != 0:
        gray = _luma(red, green, blue)
        red, green, blue = gray, gray, gray
    tl.store(start + at, red.to(tl.uint8), inside)
    tl.store(start + pixels + at, green.to(tl.uint8), inside)
    tl.store(start + 2 * pixels + at, blue.to(tl.uint8), inside)


@triton.jit
def _box(source, target, records, stride, pixels, step, size, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """One box filter of each channel along an axis of `size` pixels that lie `step` apart; crops without blur stay where they are."""
    plane = tl.program_id(0).to(tl.int64)
    record = records + plane // 3 * stride
    if tl.load(record + _BLURRED) != 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < pixels
        place = at // step % size
        start = source + plane * pixels
        # Centred on zero, so that the sums of PIL's unsigned numbers fit signed ones.
        total = (tl.load(start + at, inside, 0).to(tl.int32) - 128) * tl.load(record + _WEIGHTS) + tl.load(record + _BIAS)
        for distance in range(1, TAPS):
            weight = tl.load(record + _WEIGHTS + distance)
            before = at - tl.minimum(distance, place) * step  # the edge repeats without end
            after = at + tl.minimum(distance, size - 1 - place) * step
            total += (tl.load(start + before, inside, 0).to(tl.int32) - 128) * weight
            total += (tl.load(start + after, inside, 0).to(tl.int32) - 128) * weight
        tl.store(target + plane * pixels + at, ((total >> 24) + 128).to(tl.uint8), inside)


@triton.jit
def _finish(levels, records, normal, image, stride, pixels, BLOCK: tl.constexpr):
    """Solarized and normalised."""
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    level = tl.load(levels + plane * pixels + at, inside, 0).to(tl.int32)
    if tl.load(records + plane // 3 * stride + _SOLARIZE) != 0:
        level = tl.minimum(level, 255 - level)
    center, spread = tl.load(normal + plane % 3), tl.load(normal + 3 + plane % 3)
    share = tl.div_rn(level.to(tl.float32), 255.0)
    tl.store(image + plane * pixels + at, tl.div_rn(share - center, spread), inside)
