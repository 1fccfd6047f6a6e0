"""Sums over the ranks, where there are any."""

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
