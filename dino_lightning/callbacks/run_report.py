"""What a person wants to know of a run: before it what it will do, after it what came out and what to try next."""

import os
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from dino_lightning.callbacks.doctor import CollapseDoctor
from dino_lightning.callbacks.online_knn import OnlineKNN
from dino_lightning.callbacks.run_folder import run_folder
from dino_lightning.data.datamodule import MultiCropDataModule
from dino_lightning.data.roots import split_name
from dino_lightning.training.plan import count_steps, images_per_step

_SKIPPED = 2  # first steps, in which everything is slower
_SECONDS, _STEPS = 10.0, 50  # on which the estimate rests; fewer where epochs are shorter
_PATIENCE = 30.0  # seconds after which slow steps are enough of them
_LONG = 6 * 3600.0  # seconds of a run on a CPU, from which on it says what else there is


class RunReport(Callback):
    """Prints, a few lines each: before the first step the images, the network, the device, the steps and the run folder; after
    the first steps how long it will take; at the end the checkpoints, pictures and k-NN accuracy, and what to try next.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._described = False
        self._first: int | None = None  # step at which the training begins, if it does

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(trainer, pl_module)

    def _describe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only when a resumed run is in its place, since this makes the training loader."""
        if self._described:
            return
        self._described = True
        total, in_epoch = count_steps(trainer)
        folder, images, device = run_folder(trainer), images_per_step(trainer, first_batch_size=0), _device(trainer)
        if not trainer.is_global_zero:
            return
        size = sum(parameter.numel() for parameter in pl_module.trained.backbone.parameters()) / 1e6
        name = pl_module.backbone_name or type(pl_module.trained.backbone).__name__.removeprefix("FSDP")
        step = f" of {images} images" if images else ""
        prototypes = f", {pl_module.options['out_dim']} prototypes" if "out_dim" in pl_module.options else ""
        _table(
            images=_images(trainer),
            network=f"{name}, {size:.1f} million parameters{prototypes}",
            device=f"{device}, precision {trainer.precision}",
            steps=f"{total}{step}, {in_epoch} an epoch",
            **{"run folder": folder},
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(trainer, pl_module)
        self._began = self._since = time.monotonic()
        self._first = self._timed = trainer.global_step  # the step at which the time is taken
        self._told = not trainer.is_global_zero

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, timed = time.monotonic(), trainer.global_step - self._timed
        if self._told or timed == 0:
            return
        if trainer.global_step - self._first <= _SKIPPED and now - self._began < _PATIENCE:
            self._since, self._timed = now, trainer.global_step
            return
        spent = now - self._since
        if spent >= _PATIENCE or (timed >= _STEPS and spent >= _SECONDS) or (timed >= 3 and trainer.is_last_batch):
            self._told = True
            pace = spent / timed
            seconds = pace * (trainer.estimated_stepping_batches - trainer.global_step)
            line = f"about {_duration(seconds)} to go ({pace:.2g} s a step), without validation"
            if pl_module.device.type == "cpu" and seconds > _LONG:
                line += "; there is no GPU in this run: the recipe cpu and fewer epochs are made for that"
            _table(time=line)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pictures = Path(run_folder(trainer)) / "pictures"
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        saved = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        files = [path for callback in saved for path in (callback.last_model_path, callback.best_model_path) if os.path.exists(path)]
        steps = 0 if self._first is None else trainer.global_step - self._first  # none in a run that was over
        of_these = "" if steps == trainer.global_step else f"the last {steps} "
        spent = f", {of_these}in {_duration(time.monotonic() - self._began)}" if steps else ", as before: nothing was left to train"
        lines = {"done": f"{trainer.global_step} steps{spent}"}
        if files:
            lines["checkpoints"] = ", ".join(dict.fromkeys(files))
        if pictures.is_dir():
            lines["pictures"] = str(pictures)
        knn = _knn(trainer)
        if knn:
            lines["k-NN top-1"] = knn
        doctor = next((callback for callback in trainer.callbacks if isinstance(callback, CollapseDoctor)), None)
        verdict = doctor.summary(trainer) if doctor and steps else ""
        if verdict:
            lines["doctor"] = verdict
        root = getattr(trainer.datamodule, "root", None)
        if files and root is not None:
            checkpoint = f"--checkpoint {shlex.quote(str(files[0]))}"
            lines["try next"] = f"dino-lightning attention IMAGE.jpg {checkpoint}"
            tool = "knn --root {} --compare true" if knn else "evaluate --root {}"
            lines[""] = f"dino-lightning {tool.format(shlex.quote(str(root)))} {checkpoint}"
        _table(**lines)


def _table(**lines: str) -> None:
    for name, text in lines.items():
        tqdm.write(f"{name:12} {text}")  # around a progress bar


def _images(trainer: Trainer) -> str:
    data, dataset = trainer.datamodule, getattr(trainer.train_dataloader, "dataset", None)
    count = f"{len(dataset)}" if hasattr(dataset, "__len__") else "of a loader that does not tell how many"
    if not isinstance(data, MultiCropDataModule):
        return count
    classes = f" in {len(data.classes)} classes ({_some(data.classes)})" if data.classes else ", no classes"
    queries = ", ".join(map(split_name, data.query_folders))
    monitored = f"; {queries} asked for the k-NN accuracy" if queries and data.classes else ""
    return f"{count}{classes}{f' in {data.root}' if data.root else ''}{monitored}"


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _device(trainer: Trainer) -> str:
    device, threads = trainer.strategy.root_device, torch.get_num_threads()
    on_host = f"{device.type}, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_host
    return f"{trainer.world_size} × {name}"


def _duration(seconds: float) -> str:
    """Rounded, in one unit: '40 s', '18 min', '5 h', '3 days'."""
    minutes, hours, days = (round(seconds / unit) for unit in (60, 3600, 86400))
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{days} days"


def _knn(trainer: Trainer) -> str | None:
    after = trainer.callback_metrics.get("val/knn_top1")
    if after is None:
        return None
    before = next((callback.before for callback in trainer.callbacks if isinstance(callback, OnlineKNN)), None)
    return f"{100 * after.item():.1f} %" + (f"; {100 * before:.1f} % before the first step" if before is not None else "")
