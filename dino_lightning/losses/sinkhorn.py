"""Sinkhorn–Knopp: targets that use all prototypes alike (Cuturi 2013; Caron et al. 2020)."""

import torch
from torch import Tensor

from dino_lightning.losses.precision import full, without_autocast
from dino_lightning.losses.ranks import all_reduce


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Distributions (n, K) of logits (n, K): exp(logits / temp), scaled in turn so that each prototype has the same mass over all
    rows, and each row sums to 1.

    The rows are those of all ranks, which may differ in number: several ranks equal one process with all rows. Every rank must
    call this, also one without rows. It ends with the rows, so that these sum to 1 and the prototypes' masses are nearly equal.
    Computed in float32 (float64 stays) whatever the autocast. Finite for any finite logits.

    Raises:
        ValueError: if the logits are not (n, K), or the temperature or the number of iterations is not positive.
    """
    if logits.dim() != 2:
        raise ValueError(f"expected logits (rows, prototypes), got {tuple(logits.shape)}")
    if temp <= 0:
        raise ValueError(f"the temperature must be positive, got {temp}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    # The result is u_k · exp(t / T) · v_n. A constant factor of a prototype or of a row is undone by u or v, so the largest exponent
    # of each prototype, then of each row, is moved out of the exponential. Then every prototype and every row has an entry of 1,
    # nothing overflows, what underflows had no weight, and u and v are all that changes from one iteration to the next.
    t = full(logits)
    highest = t.amax(dim=0) if len(t) else t.new_full(t.shape[1:], -torch.inf)
    q = t - all_reduce(highest, "max")
    row_highest = q.amax(dim=1, keepdim=True)
    q.sub_(row_highest).div_(temp).exp_()
    v = row_highest.squeeze(1).div_(temp).exp_()  # (n,): rows do not start alike
    with without_autocast(logits.device):
        for _ in range(iterations):
            u = all_reduce(q.T.mv(v)).reciprocal_()  # (K,)
            v = q.mv(u).reciprocal_()
    return q.mul_(u).mul_(v[:, None])
