"""Stops a run whose loss is no longer finite: on all ranks together, without stalling, before a checkpoint is written."""

from collections.abc import Callable

from torch import Tensor

from dino_lightning.late import LateReading


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite on at least one rank."""


class NonFiniteGuard:
    """Watches the count of non-finite losses that comes out of the centre's all-reduce, equal on all ranks.

    ``check`` comes one step after ``watch``, so that the device never waits; before a checkpoint it comes at once, and does.
    """

    def __init__(self) -> None:
        self._watched: tuple[LateReading, Callable[[], str]] | None = None

    def watch(self, count: Tensor, report: Callable[[], str]) -> None:
        """Remembers the ``count`` (scalar, on the device) of a step, and what says so if it is not zero."""
        self._watched = LateReading(count), report

    def check(self) -> Callable[[], str] | None:
        """The report of the watched step if its loss was not finite, else None. Each step is checked once."""
        if self._watched is None:
            return None
        (count, report), self._watched = self._watched, None
        return report if count.read() else None
