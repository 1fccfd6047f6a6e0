"""Stops a run whose loss is no longer finite: on all ranks together, without stalling, before a checkpoint is written."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dino_lightning.losses.ranks import all_reduce
from dino_lightning.training.late import LateReading


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite on at least one rank."""


class NonFiniteGuard:
    """Watches the count of non-finite losses, equal on all ranks.

    ``check`` is called one step after ``watch``, so that nothing waits for the device; before a checkpoint it is called at once, and waits.
    """

    def __init__(self) -> None:
        self._counted: Tensor | None = None  # non-finite losses of this rank, on the device
        self._watched: tuple[LateReading, Callable[[], str]] | None = None
        self._failure = ""

    def count(self, loss: Tensor) -> None:
        """Counts a micro-batch's loss (scalar)."""
        bad = (~loss.detach().isfinite()).float()
        self._counted = bad if self._counted is None else self._counted + bad

    def total(self, device: torch.device) -> Tensor:
        """The number of non-finite losses counted since it was asked last, over all ranks: a scalar on the device."""
        total, self._counted = self._counted, None
        return all_reduce(torch.zeros((), device=device) if total is None else total)

    def watch(self, count: Tensor, report: Callable[[], str]) -> None:
        """Remembers the ``count`` (scalar, on the device) of a step, and what says so if it is not zero."""
        self._watched = LateReading(count), report

    def check(self, trainer: Trainer | None) -> None:
        """Reads the count of the watched step, once.

        Raises:
            NonFiniteLossError: with the report of the step, if its loss was not finite; and whenever asked again.
        """
        if self._watched is not None and not self._failure:
            (count, report), self._watched = self._watched, None
            if count.read():
                self._failure = f"{report()}; {_last_checkpoint(trainer)}. {_REMEDY}"
        if self._failure:
            raise NonFiniteLossError(self._failure)


_REMEDY = "Go on from before with a lower lr or teacher_temp, a smaller clip_grad, or bf16-mixed instead of 16-mixed. All ranks stop here"


def _last_checkpoint(trainer: Trainer | None) -> str:
    folder = Path(getattr(getattr(trainer, "checkpoint_callback", None), "dirpath", None) or os.devnull)
    newest = max(folder.glob("*.ckpt"), key=os.path.getmtime, default=None)
    return f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
