"""Machines that are taken away: on a signal the run finishes its step, saves, and leaves."""

import signal
import threading
from pathlib import Path
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

    It is enough that one rank gets the signal: all leave behind the same step. A run resumed from that checkpoint ends as one
    that was never stopped. (Lightning by itself leaves without saving, or, under SLURM, saves in the middle of a step.)
    """

    def __init__(self) -> None:
        self._signal = 0
        self._step = 0  # the newest step that was looked at
        self._asked: LateReading | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._step, self._asked = 0, trainer.global_step, None
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:  # Lightning puts the handlers back that there were before the run
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # within a window of accumulated batches
            return
        self._step = trainer.global_step
        number = int(self._agreed(trainer, pl_module.device))
        if number:
            path = _last_checkpoint(trainer)
            rank_zero_warn(f"{signal.Signals(number).name}: saving {path} after step {self._step}, and leaving")
            trainer.save_checkpoint(path)
            raise SystemExit(128 + number)

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


def _last_checkpoint(trainer: Trainer) -> Path:
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath) / "last.ckpt"
    return Path(run_folder(trainer)) / "checkpoints" / "last.ckpt"
