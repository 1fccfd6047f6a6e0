"""How fast a run is, and what it waits for."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dino_lightning.evaluation.gpus import device_called, dtype_of
from dino_lightning.methods.batch import split_views

_SECONDS = 2.0  # between two readings


class Throughput(Callback):
    """Logs, as means over two seconds or more: ``train/images_per_s`` over all devices; ``train/data_wait``, the share of the time
    in which a batch is waited for (with another data module than ours, and moved); ``train/tflops``, 10¹² floating-point
    operations a second and device; and ``train/mfu``, these as a share of what the device could do, where ``evaluation.gpus`` knows that.

    It reads the host's clock only: a device that lags behind by some steps is not waited for. Validation is left out.
    """

    def __init__(self) -> None:
        self._flops = 0  # of an image; not counted yet

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flops = 0
        is_gpu = pl_module.device.type == "cuda"
        self._peak = peak_of(torch.cuda.get_device_name(pl_module.device), trainer.precision) if is_gpu else None
        self._logged: dict[str, torch.Tensor] = {}
        self._forget()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._flops:
            with trainer.precision_plugin.forward_context():
                views = [view[:1] for view in split_views(batch)]
                self._flops = pl_module.flops_per_image(views)
            self._forget()
        came = getattr(trainer.datamodule, "batch_came", None) or time.perf_counter()
        self._waited += max(0.0, came - self._ended)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(split_views(batch)[0])
        self._ended = time.perf_counter()
        seconds = self._ended - self._since
        if seconds >= _SECONDS or trainer.is_last_batch:
            tflops = self._images * self._flops / seconds / 1e12
            values = {
                "images_per_s": self._images * trainer.world_size / seconds,
                "data_wait": self._waited / seconds,
                "tflops": tflops,
            }
            if self._peak:
                values["mfu"] = tflops * 1e12 / self._peak
            # Tensors on the host: a float would be copied to the device, which waits for it.
            self._logged = {name: torch.tensor(value) for name, value in values.items()}
            self._forget()
        pl_module.report(self._logged)

    def _forget(self) -> None:
        self._since = self._ended = time.perf_counter()
        self._waited, self._images = 0.0, 0


def peak_of(name: str, precision: str) -> float | None:
    """Operations a second of a GPU of this name at a Trainer's precision; None, and said, where the table has no such number."""
    known, dtype = device_called(name), dtype_of(precision)
    peak = known.peak(dtype, tf32=torch.get_float32_matmul_precision() != "highest") if known else None
    if peak is None:
        rank_zero_info("no train/mfu in this run: the peak of %s in %s is not in dino_lightning.evaluation.gpus", name, dtype)
    return peak
