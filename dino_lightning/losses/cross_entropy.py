"""The cross-entropy of each row of logits with its target distribution: what the losses of DINO and of iBOT share."""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_lightning.losses.precision import full

Pairs = Sequence[tuple[int, ...]]

# Elements of a temporary. On a CPU 1 MiB in float32 stays in its cache; elsewhere 64 MiB keep a GPU busy.
_CPU_CHUNK, _CHUNK = 2**18, 2**24


def cross_entropy(student_logits: Tensor, targets: Tensor, temp: float, pairs: Pairs = ((0,),)) -> Tensor:
    """−Σ P_r · log softmax(s_r / temp) of each row r, in float32 (float64 stays), whatever the autocast.

    The rows of the student's logits and of the targets are blocks of n. ``pairs`` tells for each of the student's blocks with
    which blocks of the targets it is compared: P_r is their sum, so the terms of several targets share one log-softmax. By
    default there is one block of each, and every row has a target of its own.

    Args:
        student_logits: (len(pairs)·n, K).
        targets: (blocks·n, K), distributions. No gradient flows into them.
        temp: temperature of the student's softmax.

    Returns:
        (len(pairs)·n,): to be weighted and added up outside.
    """
    if temp <= 0:
        raise ValueError(f"student_temp must be positive, got {temp}")
    return _CrossEntropy.apply(student_logits, full(targets.detach()), temp, pairs)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is written by hand: row r has (n_r · q_r − P_r) / temp, with q = softmax(s / temp) and n_r = ΣP_r.

    Temporaries are as small as a chunk of rows. The backward pass recomputes q from the logits, which keeps nothing else that
    is wide but the targets, and rounds to half precision only after a gradient scaler's factor is in.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, targets: Tensor, temp: float, pairs: Pairs) -> Tensor:
        losses = targets.new_empty(len(student_logits))
        log_sums = targets.new_empty(len(student_logits), 1)
        for rows, target, _ in _chunks(student_logits, targets, pairs):
            scaled = full(student_logits[rows]) / temp  # (rows, K)
            log_q = torch.log_softmax(scaled, dim=-1)
            log_sums[rows] = scaled[:, :1] - log_q[:, :1]
            losses[rows] = log_q.mul_(target).sum(dim=-1).neg_()
        ctx.save_for_backward(student_logits, targets, log_sums)
        ctx.temp, ctx.pairs = temp, pairs
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor):
        student_logits, targets, log_sums = ctx.saved_tensors
        scale = grad_losses[:, None] / ctx.temp
        gradient = torch.empty_like(student_logits)
        for rows, target, n_targets in _chunks(student_logits, targets, ctx.pairs):
            whole = gradient.dtype == targets.dtype  # else rounded to half precision at the end
            out = gradient[rows] if whole else torch.empty_like(target)
            torch.add(math.log(n_targets) - log_sums[rows], student_logits[rows], alpha=1 / ctx.temp, out=out)
            out.exp_().sub_(target).mul_(scale[rows])  # exp gives n_r · q_r
            if not whole:
                gradient[rows] = out
        return gradient, None, None, None


def _chunks(student_logits: Tensor, targets: Tensor, pairs: Pairs) -> Iterator[tuple[slice, Tensor, int]]:
    """Rows of the student's logits, what they are compared with (rows, K), and how many distributions that adds up."""
    n = len(student_logits) // len(pairs)
    sums = {
        blocks: functools.reduce(torch.add, [targets[i * n : (i + 1) * n] for i in blocks]) for blocks in set(pairs)
    }  # a single block is not copied
    for i, blocks in enumerate(pairs):
        for rows in row_chunks(n, targets):
            yield slice(i * n + rows.start, i * n + rows.stop), sums[blocks][rows], len(blocks)


def row_chunks(rows: int, like: Tensor) -> Iterator[slice]:
    """Slices of so many rows, each as wide as those of ``like`` (n, K), for temporaries of a size that suits its device."""
    step = max(1, (_CPU_CHUNK if like.device.type == "cpu" else _CHUNK) // like.shape[1])
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
