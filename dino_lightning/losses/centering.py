"""Centred and sharpened targets: softmax((t − c) / T) with c the running mean of the teacher's logits (Caron et al. 2021, equation 4)."""

import torch
from torch import Tensor, nn

from dino_lightning.losses.ranks import all_reduce, n_ranks


class Centering(nn.Module):
    """The teacher's distributions by a running mean of its logits, as DINOv2 makes them of class tokens or of masked patches.

    In training mode each call also adds up what the centre needs; ``update_center()`` commits that once per optimizer step. The
    centre used is always the one before the step's update.

    Attributes:
        center: (1, K) buffer, the running mean of the logits.
    """

    center: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # Sum of the logits (K,) and number of rows since the last commit.
        # Not a buffer: DistributedDataParallel would overwrite it with rank 0's.
        self._pending: tuple[Tensor, int] | None = None

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """The distributions (n, K) of logits (n, K), in float32 (float64 stays) whatever the autocast. n may be 0.

        Raises:
            ValueError: if the shape does not fit, or the temperature is not positive.
        """
        k = self.center.shape[1]
        if logits.dim() != 2 or logits.shape[1] != k:
            raise ValueError(f"expected logits (rows, {k}), got {tuple(logits.shape)}")
        if temp <= 0:
            raise ValueError(f"the temperature must be positive, got {temp}")
        if self.training:
            total, count = self._pending or (0, 0)
            self._pending = total + logits.sum(dim=0, dtype=self.center.dtype), count + len(logits)
        # The centre is float32, and so is what is left of logits of half precision.
        return (logits - self.center).div_(temp).softmax(dim=-1)

    @torch.no_grad()
    def update_center(self, keep: Tensor | None = None) -> None:
        """Commits the centre: c ← m·c + (1 − m)·mean of the logits since the last commit.

        The mean runs over the rows of all micro-batches of a rank, and then over the ranks, each of which weighs the same however
        many rows it had; one without rows counts as the centre itself. All ranks must call this, each having called the module
        (with no rows, where it had none), or none; without a call since the last commit nothing happens.

        Args:
            keep: scalar bool, the same on all ranks: where it is true, the centre stays. It also stays where a logit on any rank
                was not finite. Nothing is read back to the host.
        """
        if self._pending is None:
            return
        (total, count), self._pending = self._pending, None
        center = self.center[0]
        mean = all_reduce(total / count if count else center.clone()) / n_ranks()
        moves = torch.isfinite(mean).all()
        if keep is not None:
            moves = moves & ~keep
        self.center.copy_(torch.where(moves, center.lerp(mean, 1 - self.momentum), center))

    def reset(self) -> None:
        """Forgets what was recorded since the last commit, as when a new run begins."""
        self._pending = None
