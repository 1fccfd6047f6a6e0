"""Sums, maxima and gathers over the ranks; without a process group there is one rank."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """``x``, in place, added up (or its ``"max"``) over all ranks; as it is without a process group. Every rank must call this."""
    if n_ranks() > 1:
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def n_ranks() -> int:
    """Processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process in the default group; 0 without one."""
    return dist.get_rank() if n_ranks() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks; small things, pickled. Every rank must call this, and waits."""
    if n_ranks() == 1:
        return [value]
    values: list[Any] = [None] * n_ranks()
    dist.all_gather_object(values, value)
    return values


def gather(x: Tensor) -> Tensor:
    """Rows (B, D) of every rank, in the order of ranks: (n·B, D), with a gradient to all of them. Every rank must call this.

    Backward adds up over the ranks: what each rank's loss owes to a row reaches the rank that has it.
    """
    return _Gather.apply(x) if n_ranks() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_ranks())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format)).chunk(n_ranks())[rank()]
