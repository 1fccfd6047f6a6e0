"""Floating-point operations of a training step, counted by running the networks once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def flops_per_image(student: nn.Module, teacher: nn.Module, views: Sequence[Tensor]) -> int:
    """Of one image's views (1, C, H, W): the student's forward pass over all of them, twice that for its backward pass, and
    the teacher's forward pass over the two global ones. Matrix products, convolutions and attention count; the rest is small.

    The networks take a list of views of any sizes. They are left in the modes they were in; batch norms take no part.
    """

    def forward(network: nn.Module, seen: Sequence[Tensor]) -> int:
        modes = {module: module.training for module in network.modules()}
        for module in modes:
            module.training = False
        try:
            with FlopCounterMode(display=False) as counter:
                network(seen)
        finally:
            for module, training in modes.items():
                module.training = training
        return counter.get_total_flops()

    return 3 * forward(student, views) + forward(teacher, views[:2])
