"""Sinkhorn-Knopp: distributions of a batch that use all prototypes alike (Cuturi 2013; Caron et al. 2020; DINOv2)."""

import torch
import torch.distributed as dist
from torch import Tensor

from dino_lightning.losses.cross_entropy import full


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Logits (n, K) → distributions (n, K) over prototypes, float32, such that all samples together use each prototype about alike.

    Starts from exp(logits / temp) and in turn gives all prototypes the same mass, then all samples; rows of the result sum to 1.
    The samples are those of all ranks, each with as many as it has, so that ranks equal one process with all rows. Every rank
    must call this.

    It scales prototypes by a vector u and samples by a vector v, and never the matrix: two matrix-vector products an iteration. The
    greatest logit of every sample is taken out first, so that nothing overflows and no sample vanishes.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temp <= 0:
        raise ValueError(f"temp must be positive, got {temp}")
    tiny = torch.finfo(torch.float32).tiny
    with torch.autocast(logits.device.type, enabled=False):
        scaled = full(logits) / temp
        greatest = scaled.amax(dim=1) if len(scaled) else scaled.new_empty(0)  # (n,)
        q = scaled.sub_(greatest[:, None]).exp_()
        overall = greatest.amax() if len(greatest) else scaled.new_full((), -torch.inf)
        v = (greatest - _over_ranks(overall, dist.ReduceOp.MAX)).exp()
        for _ in range(iterations):
            # Constant factors, such as 1 / K, cancel in the end.
            u = 1 / _over_ranks(v @ q, dist.ReduceOp.SUM).clamp(min=tiny)  # (K,)
            u /= u.amax()
            v = 1 / (q @ u).clamp(min=tiny)
        q *= u
        return q.mul_(v[:, None])


def _over_ranks(value: Tensor, operation: dist.ReduceOp) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, operation)
    return value
