"""Positions of patches: learned ones at the grid of another image size, and fixed ones."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size in pixels or patches, which may be one number for both.

    Raises:
        ValueError: if it is neither one number nor two.
    """
    if isinstance(size, numbers.Integral):
        return int(size), int(size)
    if len(size) != 2:
        raise ValueError(f"a size must be one number or (height, width), got {size}")
    return int(size[0]), int(size[1])


def interpolate_positions(positions: Tensor, grid: tuple[int, int], target: tuple[int, int], offset: float, antialias: bool) -> Tensor:
    """Positions (1, 1 + h·w, D) of a grid (h, w) and of the class token, which stays, for another grid; bicubic."""
    # The reference scales by (n + 0.1) / grid and samples at that scale, which differs from a resize to n by up to 28 %.
    scale = tuple((to + offset) / side for to, side in zip(target, grid)) if offset else None
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    patches = _Bicubic.apply(patches, target, scale, antialias)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class _Bicubic(torch.autograd.Function):
    """torch's interpolation, with a gradient of matrix products: CUDA's adds up in an order that differs from run to run."""

    @staticmethod
    def forward(ctx, images: Tensor, target: tuple[int, int], scale: tuple[float, float] | None, antialias: bool) -> Tensor:
        ctx.shape, ctx.target, ctx.scale, ctx.antialias = images.shape, target, scale, antialias
        return _bicubic(images, target, scale, antialias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        # Linear along each axis: the matrix (n', n) is what it makes of the n unit vectors.
        rows, columns = (
            _bicubic(
                torch.eye(side, dtype=gradient.dtype, device=gradient.device)[None, None],
                (to, side),
                None if ctx.scale is None else (ctx.scale[axis], 1.0),
                ctx.antialias,
            )[0, 0]
            for axis, (side, to) in enumerate(zip(ctx.shape[2:], ctx.target))
        )
        return rows.t() @ gradient @ columns, None, None, None


def _bicubic(images: Tensor, target: tuple[int, int], scale: tuple[float, float] | None, antialias: bool) -> Tensor:
    size = {"size": target} if scale is None else {"scale_factor": scale}
    return F.interpolate(images, mode="bicubic", antialias=antialias, **size)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions (1, 1 + h·w, ``dim``) of a grid (h, w) of patches, row by row, and of the class token, which are zeros.

    A quarter each is the sine and the cosine of the column, then of the row, at frequencies from 1 down to nearly 1 / 10,000
    (Vaswani et al. 2017, section 3.5, along each axis).

    Raises:
        ValueError: if four does not divide ``dim``.
    """
    if dim % 4:
        raise ValueError(f"fixed positions need a width that four divides, got {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [places.flatten()[:, None] * frequencies for places in (columns, rows)]
    patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]
