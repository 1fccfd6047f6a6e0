"""Masks of rectangular blocks of patches, as BEiT's and DINOv2's training draws them (Bao et al. 2022, Oquab et al. 2023)."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dino_lightning.backbones.positions import height_width

_LEAST_AREA = 4  # of a block, in patches
_LEAST_ASPECT = 0.3  # of a block; the greatest is its inverse
_TRIES = 10  # for each block of a mask


def sample_masks(
    n_crops: int,
    grid: int | tuple[int, int],
    *,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
    generator: np.random.Generator | torch.Generator,
) -> Tensor:
    """Masks for the crops of a batch: bool (``n_crops``, h, w) on the CPU, true where a patch is masked.

    Exactly int(``n_crops`` · ``probability``) crops are masked, in random places of the batch. Of n of them, each asks for a share of
    its patches from its own n-th part of ``ratio``; it may get a few less, since blocks must fit. A block is at most half of a crop.

    Args:
        n_crops: crops of the batch, all views together.
        grid: patches of a crop, int or (h, w).
        ratio: the least and the greatest share of patches that a masked crop asks for.
        probability: share of masked crops.
        generator: of numpy, or of torch on the CPU; it is advanced.

    Raises:
        ValueError: if ``ratio`` or ``probability`` do not lie within [0, 1], or ``ratio`` falls.
    """
    low, high = ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the mask ratio must rise within [0, 1], as (0.1, 0.5) does, got {tuple(ratio)}")
    if not 0 <= probability <= 1:
        raise ValueError(f"the mask probability must lie within [0, 1], got {probability}")
    height, width = height_width(grid)
    if isinstance(generator, torch.Generator):
        generator = np.random.default_rng(torch.randint(2**63 - 1, (), generator=generator).item())
    n_masked = int(n_crops * probability)
    edges = np.linspace(low, high, n_masked + 1)
    requests = (height * width * generator.uniform(edges[:-1], edges[1:])).astype(int)
    draws, n_bytes = _draws(generator), -(-height * width // 8)
    drawn = b"".join(_mask(request, height, width, draws).to_bytes(n_bytes, "little") for request in requests.tolist())
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8).reshape(n_masked, n_bytes), axis=1, bitorder="little")
    masks = np.zeros((n_crops, height, width), bool)
    masks[generator.permutation(n_crops)[:n_masked]] = bits[:, : height * width].reshape(n_masked, height, width)
    return torch.from_numpy(masks)


def _draws(generator: np.random.Generator) -> Iterator[list[float]]:
    """Four numbers in [0, 1) for each try; drawn together, since one draw of numpy costs as much as a whole try."""
    while True:
        yield from generator.random((256, 4)).tolist()


def _mask(request: int, height: int, width: int, draws: Iterator[list[float]]) -> int:
    """A mask of at most ``request`` patches: patch (i, j) is bit i·width + j of a number, which is faster than an array.

    Blocks are added until the request is met, or until none is found.
    """
    mask, masked = 0, 0
    greatest = height // 2 * width
    while masked < request:
        block = _new_block(mask, min(request - masked, greatest), height, width, draws)
        if not block:
            break
        mask |= block
        masked = mask.bit_count()
    return mask


def _new_block(mask: int, room: int, height: int, width: int, draws: Iterator[list[float]]) -> int:
    """A block that adds between 1 and ``room`` patches to a mask; 0 if some tries found none."""
    for _ in range(_TRIES):
        area, aspect, top, left = next(draws)
        area = _LEAST_AREA + (room - _LEAST_AREA) * area  # in either order
        aspect = _LEAST_ASPECT ** (2 * aspect - 1)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            row = ((1 << w) - 1) << int(left * (width - w + 1))
            # One row times a bit for each row's beginning: h rows.
            block = row * (((1 << h * width) - 1) // ((1 << width) - 1)) << int(top * (height - h + 1)) * width
            if 0 < (block & ~mask).bit_count() <= room:
                return block
    return 0
