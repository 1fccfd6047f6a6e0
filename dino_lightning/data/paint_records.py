"""What a crop is painted with: one record of numbers, drawn by the worker, and what PIL makes of these numbers."""

import functools

import numpy as np
import torch
from torch import Tensor

# One record per crop. Factor 1.0 (brightness, contrast, saturation) and hue 0.0 mean "leave this operation out": any
# other hue, however small, costs a round trip through 8-bit HSV, as in PIL. Hue is in turns, blur_sigma in pixels.
PAINT = np.dtype(
    [
        ("jitter", np.bool_),
        ("order", np.uint8, (4,)),
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),
        ("gray", np.bool_),
        ("blur_sigma", np.float32),
        ("solarize", np.bool_),
    ]
)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

ONE = 1 << 24  # PIL's box weights are fixed-point numbers with 24 fractional bits


def hue_shifts(hue: np.ndarray) -> np.ndarray:
    """What is added to PIL's 8-bit hue, 0..255, (n,) in turns -> (n,): the truncated shift, which wraps around."""
    return np.trunc(hue.astype(np.float64) * 255) % 256


@functools.cache
def hue_table(device: torch.device) -> Tensor:
    """PIL's hue, float32, for each (largest channel, difference of the other two from -255 on, span), 3 × 511 × 256 in a row."""
    largest = torch.arange(3).view(3, 1, 1)
    difference = torch.arange(-255, 256).view(1, 511, 1)
    span = torch.arange(256).view(1, 1, 256)
    # Of the two others one is the span below the largest, the other, by which they differ, less. Quotients are float32,
    # their sums float64, then float32 again: in C the constants 2.0 and 4.0 are doubles, and rounding the sums twice
    # would move some hues to the neighbouring level.
    below = [(span + part) / span.clamp(min=1) for part in (difference.clamp(max=0), -difference.clamp(min=0))]
    sixths = (2 * largest + below[0].double()) - below[1].double()
    turns = sixths.float() / 6
    return (turns - turns.floor()).mul(255).floor().flatten().to(device)


def box_weights(sigma: np.ndarray) -> np.ndarray:
    """Numbers of PIL's GaussianBlur for its `sigma`, (n,) -> (n, 1 + taps): the rounding bias, then the weights of the pixels
    0, 1, 2, ... away.

    The box that, run three times, has variance sigma**2 has a fractional radius (Gwosdek et al., "Theoretical
    Foundations of Gaussian Convolution by Extended Box Filtering", SSVM 2011): full weight up to its whole part, the
    rest on the next pixel. float32 where PIL has it. All results are whole and at most 2**24, so float32 can hold them.
    """
    variance = sigma * sigma / np.float32(3)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length - 1) / 2)
    radius = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    whole = np.floor(radius).astype(np.int64)[:, None]  # (n, 1)
    full = (np.float32(ONE) / (radius * 2 + 1)).astype(np.int64)[:, None]
    edge = (ONE - (2 * whole + 1) * full) // 2
    distance = np.arange(whole.max(initial=0) + 2)
    weights = np.where(distance <= whole, full, np.where(distance == whole + 1, edge, 0))
    # Half a level for rounding, less what the zero shift by 128 levels misses where the weights sum to ONE - 1.
    bias = ONE // 2 + 128 * (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True) - ONE)
    return np.concatenate([bias, weights], axis=1)
