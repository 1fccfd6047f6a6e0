"""Machines that are taken away, and Ctrl-C: on a signal the run finishes its step, saves, and leaves."""

import logging
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from dino_lightning.callbacks.run_folder import last_checkpoint
from dino_lightning.losses.ranks import all_reduce
from dino_lightning.training.late import LateReading
from dino_lightning.training.resume import validate_again

log = logging.getLogger(__name__)

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1
_TWICE = 1.0  # seconds after which a Ctrl-C is the second one: torchrun passes the first on, so that it comes twice


class StopOnSignal(Callback):
    """On SIGINT (Ctrl-C), SIGTERM or SIGUSR1, finishes the optimizer step, writes ``checkpoints/last.ckpt`` and exits with
    128 + the signal's number. A second Ctrl-C leaves at once.

    It is enough that one rank gets the signal: all leave after the same step, one later than on a single device. During a
    validation they leave within it; the resumed run begins with that validation. A run resumed from the checkpoint ends as one
    that was never stopped. (Lightning by itself leaves without saving, or, under SLURM, saves in the middle of a step.)
    """

    def __init__(self) -> None:
        self._signal, self._since = 0, 0.0
        self._step = 0  # the newest step that was looked at
        self._asked: LateReading | None = None
        self._due = 0  # the signal that all ranks know of
        self._saved = False
        self._even = True  # whether all ranks have as many validation batches

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._asked, self._due, self._saved = 0, None, 0, False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._listen(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # within a window of accumulated batches
            return
        self._step = trainer.global_step
        self._due = self._agreed(trainer, pl_module.device) or self._due
        if self._due and not trainer.is_last_batch:  # else a validation may follow, which a resumed run would leave out
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due and not self._saved and not trainer.fit_loop.done:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._saved:  # only now has the step been logged
            raise SystemExit(128 + self._due)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._even = trainer.world_size == 1 or _is_even(trainer, pl_module.device)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self._even:
            return
        self._due = self._agreed(trainer, pl_module.device) or self._due
        if self._due:
            if not trainer.sanity_checking:  # before it nothing was trained
                self._save(trainer)
            raise SystemExit(128 + self._due)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._due and trainer.validating:
            validate_again(checkpoint)

    def _save(self, trainer: Trainer) -> None:
        path = last_checkpoint(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(self._due).name
            log.warning("%s: saving %s after step %d, and leaving; --ckpt_path last goes on", name, path, trainer.global_step)
        trainer.save_checkpoint(path)
        self._saved = True

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:  # Lightning puts the handlers back that there were before the run
                signal.signal(number, partial(self._note, trainer))

    def _note(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        if trainer.state.status != TrainerStatus.RUNNING:  # an error ended the run before the handlers were put back
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if number == signal.SIGINT:
            if self._signal and time.monotonic() - self._since > _TWICE:
                raise KeyboardInterrupt
            if not self._signal and trainer.is_global_zero:
                log.warning("Ctrl-C: finishing the step and saving; once more leaves at once, without saving")
        if not self._signal:
            self._signal, self._since = number, time.monotonic()

    def _agreed(self, trainer: Trainer, device: torch.device) -> int:
        """The signal that any rank has got, the same on all ranks: with several, that of the step before, read without waiting."""
        if trainer.world_size == 1:
            return self._signal
        before, asked = self._asked, torch.full((), self._signal, device=device)
        all_reduce(asked, "max")
        self._asked = LateReading(asked)
        return int(before.read()) if before else 0


def _is_even(trainer: Trainer, device: torch.device) -> bool:
    """Whether the ranks have the same number of validation batches, after each of which they can agree."""
    batches = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    most = torch.tensor([batches, -batches], device=device)
    all_reduce(most, "max")
    return bool(most.sum() == 0)
