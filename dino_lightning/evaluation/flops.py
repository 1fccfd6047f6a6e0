"""Floating-point operations of a training step, counted by running the networks once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning.networks import Network


@torch.no_grad()
def flops_per_image(student: Network, teacher: Network, views: Sequence[Tensor]) -> int:
    """Of one image's views (1, C, H, W): the student's forward pass over all of them, twice that for its backward pass, and
    the teacher's forward pass over the two global ones. Matrix products, convolutions and attention count; the rest is small.

    The networks are left in the modes they were in; batch norms take no part.
    """

    def forward(network: Network, seen: Sequence[Tensor]) -> int:
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
