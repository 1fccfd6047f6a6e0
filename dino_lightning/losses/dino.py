"""The DINO loss: cross-entropy of the student's views against the centred, sharpened teacher's (paper, equations 1 to 4)."""

import torch
from torch import Tensor, nn

from dino_lightning.losses.cross_entropy import cross_entropy, row_chunks
from dino_lightning.losses.precision import full
from dino_lightning.losses.ranks import all_reduce


class DINOLoss(nn.Module):
    """Mean cross-entropy H(teacher view i, student view v) over all pairs of different views, i of the two global ones.

    With 2 + 8 views these are 18 terms. Everything is computed in float32 whatever the autocast, and the inputs are never
    modified.

    In training mode each call also adds up what the centre needs; ``update_center()`` commits that once per optimizer
    step, over all micro-batches and ranks. The centre used is always the one before the step's update.

    Attributes:
        center: (1, K) buffer, the running mean of the teacher's logits.
        teacher_entropy: scalar, the mean entropy in nats of the teacher's distributions in the last call, or None before it.
            The loss is this entropy plus the mean KL divergence from teacher to student.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        if student_temp <= 0:
            raise ValueError(f"student_temp must be positive, got {student_temp}")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must lie in [0, 1], got {center_momentum}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_entropy: Tensor | None = None
        # (K + 2,): sum of the teacher's logits, number of rows, number of non-finite losses since the last commit.
        # Not a buffer: DistributedDataParallel would overwrite it with rank 0's.
        self._pending: Tensor | None = None

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Loss of one (micro-)batch.

        Args:
            student_logits: (V·B, K), views-major; the first two views are the global ones.
            teacher_logits: (2·B, K), the global views.
            teacher_temp: temperature of the teacher's softmax.

        Raises:
            ValueError: if the shapes do not fit together, or the temperature is not positive.
        """
        self._check(student_logits, teacher_logits, teacher_temp)
        with torch.no_grad():
            p, entropies = self._targets(teacher_logits, teacher_temp)  # (2·B, K), (2·B,)
            self.teacher_entropy = entropies.mean()
        of_global, of_local = dino_terms(student_logits, p, self.student_temp)
        loss = of_global + of_local
        if self.training:
            self._record(teacher_logits, loss.detach())
        return loss

    @torch.no_grad()
    def update_center(self, skip: bool = False) -> Tensor | None:
        """Commits the centre: c ← m·c + (1 − m)·mean of the teacher's logits since the last commit (paper, equation 4).

        The mean runs over all ranks and micro-batches; every rank must call this. A step with a non-finite loss on any rank
        leaves the centre as it was, and so does ``skip`` (a gradient scaler skipped the optimizer step).

        Returns:
            The number of non-finite losses over all ranks, a scalar on the device (nothing is read back to the host), or
            None if nothing was recorded since the last commit.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        all_reduce(pending)
        total, count, non_finite = pending[:-2], pending[-2], pending[-1]
        updated = self.center.lerp((total / count).to(self.center.dtype), 1 - self.center_momentum)
        if not skip:
            self.center.copy_(torch.where(non_finite > 0, self.center, updated))
        return non_finite

    def reset(self) -> None:
        """Forgets what was recorded since the last commit, as when a new run begins."""
        self._pending = None

    def _targets(self, teacher_logits: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        """The teacher's distributions (2·B, K), and their entropies (2·B,) in nats; temporaries are as small as a chunk of rows."""
        p = torch.empty_like(teacher_logits, dtype=torch.promote_types(full(teacher_logits[:0]).dtype, self.center.dtype))
        entropies = p.new_empty(len(p))
        for rows in row_chunks(len(p), p):
            log_p = torch.log_softmax((full(teacher_logits[rows]) - self.center).div_(temp), dim=-1)
            torch.exp(log_p, out=p[rows])
            entropies[rows] = log_p.mul_(p[rows]).sum(dim=-1).neg_()
        return p, entropies

    @torch.no_grad()
    def _record(self, teacher_logits: Tensor, loss: Tensor) -> None:
        total = teacher_logits.sum(dim=0, dtype=self.center.dtype)
        tail = torch.stack([torch.full_like(loss, len(teacher_logits)), (~torch.isfinite(loss)).to(loss.dtype)])
        record = torch.cat([total, tail])
        self._pending = record if self._pending is None else self._pending + record

    def _check(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> None:
        if teacher_temp <= 0:
            raise ValueError(f"teacher_temp must be positive, got {teacher_temp}")
        k = self.center.shape[1]
        if student_logits.shape[1:] != (k,) or teacher_logits.shape[1:] != (k,):
            raise ValueError(
                f"expected logits (rows, {k}), got student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
            )


def dino_terms(student_logits: Tensor, targets: Tensor, student_temp: float = 0.1) -> tuple[Tensor, Tensor]:
    """The two parts of the mean cross-entropy over the 2·V − 2 pairs of different views: of the global and of the local views.

    Each global view of the student is compared with the other one's distribution, each local view with both.

    Args:
        student_logits: (V·B, K), views-major; the first two views are the global ones.
        targets: (2·B, K), the teacher's distributions of the two global views, in their order.

    Returns:
        The sum over each part's pairs (2, and 2·V − 4) of the mean over B, divided by the number of all pairs; the local part
        is 0 where V is 2. In float32 whatever the autocast.

    Raises:
        ValueError: if the shapes do not fit together, or the temperature is not positive.
    """
    rows, teacher_rows = len(student_logits), len(targets)
    if student_logits.dim() != 2 or targets.shape[1:] != student_logits.shape[1:]:
        raise ValueError(f"expected logits (V·B, K) and targets (2·B, K), got {tuple(student_logits.shape)} and {tuple(targets.shape)}")
    if teacher_rows == 0 or teacher_rows % 2 or rows % (teacher_rows // 2) or rows < teacher_rows:
        raise ValueError(
            f"expected 2·B teacher rows and V·B student rows with V ≥ 2, got {teacher_rows} and {rows}: "
            "the teacher sees the two global views, the student all V"
        )
    n_local = (rows - teacher_rows) // (teacher_rows // 2)
    losses = cross_entropy(student_logits, targets, student_temp, [(1,), (0,), *[(0, 1)] * n_local])
    terms = (1 + n_local) * teacher_rows  # pairs of views times images
    return losses[:teacher_rows].sum() / terms, losses[teacher_rows:].sum() / terms
