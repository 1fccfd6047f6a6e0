"""The cross-entropy of each row of logits against distributions, with a gradient written by hand: the widest tensors of a run."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 2**18  # elements of a temporary on a CPU: 1 MiB in float32 stays in its cache

# Some rows of the student's logits, what they are compared with (rows, K), and how many distributions that adds up.
Targets = Iterable[tuple[slice, Tensor, int]]


def row_cross_entropy(student_logits: Tensor, targets: Callable[[], Targets], temp: float) -> Tensor:
    """−Σ_k P_rk · log softmax(s_r / temp)_k of every row r: (R, K) → (R,), float32 for logits of half precision.

    Args:
        student_logits: (R, K).
        targets: gives the P of all rows, piece by piece, sums of one or more distributions each. It is called once for the loss and
            once for the gradient, so that nothing of it is kept in between.
        temp: temperature of the student's softmax.
    """
    return _RowCrossEntropy.apply(student_logits, targets, temp)


def full(logits: Tensor) -> Tensor:
    """Half precision to float32; anything wider stays."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _RowCrossEntropy(torch.autograd.Function):
    """The gradient of row r is g_r · (n_r · q_r − P_r) / temp, with n_r = ΣP_r.

    The backward pass recomputes q from the logits, so that nothing else that is wide is kept, temporaries are as small as a chunk of
    rows, and it rounds to half precision only after a gradient scaler's factor is in.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, targets: Callable[[], Targets], temp: float) -> Tensor:
        wide = full(student_logits[:0]).dtype
        losses = student_logits.new_empty(len(student_logits), dtype=wide)
        log_sums = student_logits.new_empty(len(student_logits), 1, dtype=wide)
        for rows, target, _ in _chunks(targets()):
            scaled = full(student_logits[rows]) / temp  # (rows, K)
            log_q = torch.log_softmax(scaled, dim=-1)
            log_sums[rows] = scaled[:, :1] - log_q[:, :1]
            losses[rows] = -log_q.mul_(target).sum(dim=-1)
        ctx.save_for_backward(student_logits, log_sums)
        ctx.targets, ctx.temp = targets, temp
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor):
        student_logits, log_sums = ctx.saved_tensors
        scale = (grad_losses / ctx.temp).unsqueeze(1)
        gradient = torch.empty_like(student_logits)
        whole = gradient.dtype == log_sums.dtype  # else rounded to half precision at the end
        for rows, target, n_targets in _chunks(ctx.targets()):
            out = gradient[rows] if whole else torch.empty_like(target)
            torch.add(math.log(n_targets) - log_sums[rows], student_logits[rows], alpha=1 / ctx.temp, out=out)
            out.exp_().sub_(target).mul_(scale[rows])  # exp gives n_r · q_r
            if not whole:
                gradient[rows] = out
        return gradient, None, None


def _chunks(targets: Targets) -> Iterator[tuple[slice, Tensor, int]]:
    for rows, target, n_targets in targets:
        step = max(1, _CHUNK // target.shape[1]) if target.device.type == "cpu" else max(1, len(target))
        for start in range(0, len(target), step):
            part = target[start : start + step]
            yield slice(rows.start + start, rows.start + start + len(part)), part, n_targets
