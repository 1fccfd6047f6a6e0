"""Checkpoints by the clock, so that a machine that dies costs minutes and not an epoch."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dino_lightning.callbacks.run_folder import last_checkpoint
from dino_lightning.losses.ranks import all_reduce
from dino_lightning.training.late import LateReading

_STEPS = 10  # between two agreements of several ranks on the time


class SaveEvery(Callback):
    """Writes ``checkpoints/last.ckpt`` after the first optimizer step after so many minutes without a checkpoint of its own.

    A run resumed from it ends as one that was never stopped. (Lightning's ``ModelCheckpoint(train_time_interval=...)`` may save
    in the middle of accumulated batches, and has several ranks wait for each other at every batch.)

    Args:
        minutes: between two checkpoints.
    """

    def __init__(self, minutes: float = 10.0) -> None:
        if minutes <= 0:
            raise ValueError(f"minutes must be positive, got {minutes}")
        self.minutes = minutes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()
        self._step = self._agreed_at = trainer.global_step  # the newest that was looked at, and at which all ranks were asked
        self._asked: LateReading | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not where a validation follows, which a resumed run would leave out.
        if trainer.global_step == self._step or trainer.is_last_batch or _may_validate(trainer, batch_idx):
            return
        self._step = trainer.global_step
        if self._is_due(trainer, pl_module.device):
            trainer.save_checkpoint(last_checkpoint(trainer))
            self._since = time.monotonic()

    def _is_due(self, trainer: Trainer, device: torch.device) -> bool:
        """The same on all ranks: with several, as the first of them saw it some steps ago, read without waiting."""
        late = time.monotonic() - self._since > 60 * self.minutes
        if trainer.world_size == 1:
            return late
        if self._step - self._agreed_at < _STEPS:
            return False
        self._agreed_at = self._step
        before, asked = self._asked, torch.full((), float(late), device=device)
        all_reduce(asked, "max")
        self._asked = LateReading(asked)
        if before is None or not before.read():
            return False
        self._asked = None  # it was asked before this checkpoint
        return True


def _may_validate(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the batch is one of those, within an epoch or over their ends, after which ``val_check_interval`` may be over."""
    every = trainer.val_check_batch
    return isinstance(every, int) and 0 in ((batch_idx + 1) % every, (trainer.fit_loop.total_batch_idx + 1) % every)
