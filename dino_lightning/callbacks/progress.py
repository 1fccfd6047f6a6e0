"""A progress bar that shows what matters and does not make the device wait at every step."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

_SECONDS = 0.5  # between two readings of the device
_SHOWN = {
    "loss": ("train/loss", "{:.3f}"),
    "entropy": ("train/teacher_entropy", "{:.3f}"),
    "images/s": ("train/images_per_s", "{:.1f}"),
    "data wait": ("train/data_wait", "{:.0%}"),
    "mfu": ("train/mfu", "{:.0%}"),
}  # of what is logged


class ProgressBar(TQDMProgressBar):
    """Loss, teacher entropy (nats), learning rate, and what ``Throughput`` logs, read twice a second."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._read = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        is_last = batch_idx + 1 >= trainer.num_training_batches
        if is_last or time.monotonic() - self._read >= _SECONDS:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._read = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        logged = trainer.callback_metrics  # a subclass's own training_step need not log all
        shown = {label: form.format(logged[name].item()) for label, (name, form) in _SHOWN.items() if name in logged}
        monitored = {name: f"{value:.3f}" for name, value in super().get_metrics(trainer, pl_module).items() if "/" in name}
        if trainer.optimizers:
            shown["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}"
        return {**shown, **monitored}
