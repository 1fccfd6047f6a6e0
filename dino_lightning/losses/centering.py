"""Centring of a teacher's logits by a running mean (Caron et al. 2021, section 3.1), as DINOv2 does it for classes and for patches."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_lightning.losses.cross_entropy import full


class Centering(nn.Module):
    """Distributions of a teacher's logits, with a running mean of them subtracted. In float32 whatever the autocast.

    In training mode each call also adds up what the centre needs; ``update_center()`` commits that once per optimizer step. The
    centre used is always the one before the step's update.

    Attributes:
        center: (1, K) buffer, the running mean of the logits.
    """

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.reset()

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """softmax((logits − centre) / temp): (n, K) → (n, K).

        Raises:
            ValueError: for another K, or if the temperature is not positive.
        """
        if temp <= 0:
            raise ValueError(f"temp must be positive, got {temp}")
        if logits.ndim != 2 or logits.shape[1] != self.center.shape[1]:
            raise ValueError(f"expected logits (n, {self.center.shape[1]}), got {tuple(logits.shape)}")
        if self.training:
            total = logits.sum(dim=0, keepdim=True, dtype=self.center.dtype)
            self._total = total if self._total is None else self._total + total
            self._count += len(logits)
        return torch.softmax((full(logits) - self.center) / temp, dim=-1)

    @torch.no_grad()
    def update_center(self, keep: Tensor | None = None) -> None:
        """Commits the centre: c ← m·c + (1 − m)·mean of the logits since the last commit; every rank must call this.

        A rank's mean is over its rows of all micro-batches; then comes the mean of the ranks' means, however many rows each has, as in
        the reference. A rank without rows counts as the centre itself. Logits that are not finite leave the centre as it was.

        Args:
            keep: scalar bool, the same on all ranks: where it is true, the centre stays.
        """
        if self._total is None:
            return
        mean = self._total / self._count if self._count else self.center.clone()
        self.reset()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        stays = ~mean.isfinite().all() if keep is None else keep | ~mean.isfinite().all()
        self.center.copy_(torch.where(stays, self.center, self.center.lerp(mean, 1 - self.momentum)))

    def reset(self) -> None:
        """Forgets what was recorded since the last commit, as when a new run begins."""
        self._total: Tensor | None = None  # (1, K); not a buffer: DistributedDataParallel would overwrite it with rank 0's
        self._count = 0
