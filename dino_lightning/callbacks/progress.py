"""A progress bar that shows what matters and does not make the device wait at every step."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from dino_lightning.networks import split_views

_SECONDS = 0.5  # between two readings of the device


class ProgressBar(TQDMProgressBar):
    """Loss, teacher entropy (nats), learning rate, and images per second over all devices, read twice a second."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._images = 0
        self._since = 0.0
        self._shown: dict[str, str] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._images, self._since = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(split_views(batch)[0]) * trainer.world_size
        is_last = batch_idx + 1 >= trainer.num_training_batches
        if is_last or time.monotonic() - self._since >= _SECONDS:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        if not self._images:
            return self._shown
        names = {"loss": "train/loss", "entropy": "train/teacher_entropy"}
        logged = trainer.callback_metrics  # a subclass's own training_step need not log them
        values = {label: f"{logged[name].item():.3f}" for label, name in names.items() if name in logged}
        now = time.monotonic()
        rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        self._shown = {
            **values,
            "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}",
            "images/s": f"{rate:.1f}",
            **{name: f"{value:.3f}" for name, value in super().get_metrics(trainer, pl_module).items() if "/" in name},
        }
        return self._shown
