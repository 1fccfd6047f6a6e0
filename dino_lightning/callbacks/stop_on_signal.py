"""Machines that are taken away: on a signal the run finishes its step, saves, and leaves."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from dino_lightning.callbacks.run_config import run_folder
from dino_lightning.late import LateReading

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1


class StopOnSignal(Callback):
    """On SIGTERM or SIGUSR1, finishes the optimizer step, writes ``checkpoints/last.ckpt`` and exits with 128 + the signal's number.

    It is enough that one rank gets the signal: all leave behind the same step, one later than on a single device. The last
    step of an epoch is followed by the epoch's validation and one more step, since a resumed run would not make up for the
    validation; leave time for it. A run resumed from the checkpoint ends as one that was never stopped. (Lightning by itself
    leaves without saving, or, under SLURM, saves in the middle of a step.)
    """

    def __init__(self) -> None:
        self._signal = 0
        self._step = 0  # the newest step that was looked at
        self._asked: LateReading | None = None
        self._due = 0  # the signal that all ranks know of
        self._saved = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._asked, self._due, self._saved = 0, None, 0, False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # within a window of accumulated batches
            return
        self._step = trainer.global_step
        self._due = int(self._agreed(trainer, pl_module.device)) or self._due
        if self._due and not trainer.is_last_batch:
            path = _last_checkpoint(trainer)
            rank_zero_warn(f"{signal.Signals(self._due).name}: saving {path} after step {self._step}, and leaving")
            trainer.save_checkpoint(path)
            self._saved = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._saved:  # only now has the step been logged
            raise SystemExit(128 + self._due)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:  # Lightning puts the handlers back that there were before the run
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _agreed(self, trainer: Trainer, device: torch.device) -> float:
        """The signal that any rank has got, the same on all ranks: with several, that of the step before, read without waiting."""
        if trainer.world_size == 1:
            return self._signal
        before, asked = self._asked, torch.full((), self._signal, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self._asked = LateReading(asked)
        return before.read() if before else 0


def _last_checkpoint(trainer: Trainer) -> str:
    """A path or an address (s3://...), as that of the run's other checkpoints."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return os.path.join(callback.dirpath, "last.ckpt")
    return os.path.join(run_folder(trainer), "checkpoints", "last.ckpt")
