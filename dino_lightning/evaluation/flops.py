"""Floating-point operations of a training step, counted by running the networks once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning.backbones.features import eagerly, evaluating


def flops_per_image(student: nn.Module, teacher: nn.Module, views: Sequence[Tensor]) -> int:
    """Of one image's views (1, C, H, W): the student's forward pass over all of them, twice that for its backward pass, and
    the teacher's forward pass over the two global ones. The networks take a list of views of any sizes; a ``predictor`` of the student
    counts too.
    """
    ahead = getattr(student, "predictor", None) or nn.Identity()
    return 3 * count_flops(student, lambda: ahead(student(views))) + count_flops(teacher, lambda: teacher(views[:2]))


@torch.no_grad()
def count_flops(network: nn.Module, call: Callable[[], Any]) -> int:
    """Of a call of the network. Matrix products, convolutions and attention count; the rest is small.

    The network is left in the modes it was in; batch norms take no part.
    """
    # Compiled code would not be counted, nor by some versions of torch attention that is fused on a CPU.
    with evaluating(network.modules()), eagerly(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
