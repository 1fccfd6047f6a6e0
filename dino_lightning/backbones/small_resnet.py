"""A small residual CNN for small images and for machines without a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Images (B, C, H, W) of any size → the means of its last stage over the cells of a grid (B, ``grid² · widths[-1]``).

    A 3×3 convolution, then for each further width a 3×3 convolution of stride 2 and residual blocks of two, all with batch norm and
    ReLU. Weights and activations lie channels last, which CPUs and GPUs read faster.

    Args:
        in_chans: channels of the images.
        widths: channels of the first convolution and of each stage.
        stem_stride: of the first convolution: 1 for images of about 32 pixels, 2 or 4 for larger ones.
        blocks: residual blocks of a stage.
        grid: cells a side. 1 forgets where things are; 2 keeps quarters of the image, for photographs with a layout.
    """

    def __init__(
        self,
        in_chans: int = 3,
        widths: Sequence[int] = (32, 64, 128, 256),
        stem_stride: int = 1,
        blocks: int = 1,
        grid: int = 1,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1 or stem_stride < 1 or blocks < 0 or grid < 1:
            raise ValueError(
                f"expected two widths or more, a stem_stride and a grid of at least 1 and no negative number of blocks, got "
                f"{tuple(widths)}, {stem_stride}, {grid} and {blocks}"
            )
        self.grid = grid
        stages: list[nn.Module] = [_convolution(in_chans, widths[0], stem_stride)]
        for before, width in zip(widths, widths[1:]):
            stages += [_convolution(before, width, stride=2), *[_Residual(width) for _ in range(blocks)]]
        self.stages = nn.Sequential(*stages).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D)."""
        places = self.stages(x.contiguous(memory_format=torch.channels_last))
        if min(places.shape[-2:]) < self.grid:
            raise ValueError(f"the last stage leaves {tuple(places.shape[-2:])} places of such an image, fewer than grid={self.grid}")
        rows = places.tensor_split(self.grid, dim=2)
        return torch.cat([cell.mean(dim=(2, 3)) for row in rows for cell in row.tensor_split(self.grid, dim=3)], dim=1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _convolution(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
