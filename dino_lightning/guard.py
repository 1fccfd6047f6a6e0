"""Stops a run whose loss is no longer finite: on all ranks together, without stalling, before a checkpoint is written."""

from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite on at least one rank."""


class NonFiniteGuard:
    """Watches the count of non-finite losses that comes out of the centre's all-reduce, equal on all ranks.

    ``watch`` starts a copy to the host; ``check``, one step later, finds it done, so that the device never waits. Before a
    checkpoint, ``check`` waits for the copy.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._report: Callable[[], str] | None = None

    def watch(self, count: Tensor, report: Callable[[], str]) -> None:
        """Remembers the ``count`` (scalar, on the device) of a step, and what says so if it is not zero."""
        self._report = report
        if count.is_cuda:
            self._count = torch.empty((), dtype=count.dtype, pin_memory=True)
            self._count.copy_(count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._count = count

    def check(self) -> Callable[[], str] | None:
        """The report of the watched step if its loss was not finite, else None. Each step is checked once."""
        if self._count is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        count, self._count, self._copied = self._count, None, None
        return self._report if count.item() else None
