"""What is refused before the first step, each with the remedy."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lightning.backbones import VisionTransformer, features_at
from dino_lightning.networks import Network

log = logging.getLogger(__name__)

_HALF = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option outside its range, naming it, its value and the range."""
    for name in ("teacher_temp", "warmup_teacher_temp", "student_temp"):
        if options[name] <= 0:
            raise ValueError(f"{name} must be positive, got {options[name]}")
    for name in ("momentum_teacher", "center_momentum"):
        if not 0 <= options[name] <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {options[name]}")
    for name in (
        "lr",
        "min_lr",
        "warmup_epochs",
        "warmup_teacher_temp_epochs",
        "weight_decay",
        "weight_decay_end",
        "clip_grad",
        "freeze_last_layer",
    ):
        if options[name] < 0:
            raise ValueError(f"{name} must not be negative, got {options[name]}")
    if options["optimizer"] not in ("adamw", "sgd", "lars"):
        raise ValueError(f"optimizer must be 'adamw', 'sgd' or 'lars', got {options['optimizer']!r}")


def check_trainer(trainer: Trainer, clip_grad: float) -> None:
    """Raises ValueError for settings of the Trainer that would train something else than DINO."""
    if trainer.precision in _HALF:
        raise ValueError(
            f"precision={trainer.precision!r} keeps the teacher in half precision, where its moving average stalls: the "
            "updates are smaller than the rounding. Use 'bf16-mixed', '16-mixed' or '32-true'"
        )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} shards the weights, which the moving average of the teacher does not "
            "support; use strategy='ddp'"
        )
    if clip_grad > 0 and trainer.gradient_clip_val:
        raise ValueError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips the norm of all gradients together, "
            f"clip_grad={clip_grad} that of each tensor, as DINO does; set one of them to 0"
        )


def check_saving(trainer: Trainer) -> None:
    """Raises ValueError if a checkpoint could be written in the middle of accumulated batches."""
    window, interval, epoch = trainer.accumulate_grad_batches, trainer.val_check_batch, trainer.num_training_batches
    if window == 1:
        return
    if any(getattr(callback, "_train_time_interval", None) for callback in trainer.checkpoint_callbacks):
        raise ValueError(
            f"ModelCheckpoint(train_time_interval=...) may save in the middle of a step of accumulate_grad_batches={window}, "
            "where a checkpoint cannot be resumed exactly; use every_n_train_steps"
        )
    over_epochs = trainer.check_val_every_n_epoch is None  # then batches are counted over the ends of epochs
    if trainer.enable_validation and (
        interval is None or (interval < epoch and interval % window) or (over_epochs and (interval % window or epoch % window))
    ):
        raise ValueError(
            f"validation with val_check_interval={trainer.val_check_interval} and epochs of {epoch} batches comes in the middle "
            f"of a step of accumulate_grad_batches={window}, where a checkpoint cannot be resumed exactly; "
            f"set val_check_interval to a multiple of {window} batches"
        )


def warn_of_local_batch_norms(trainer: Trainer, student: Network) -> None:
    """Batch norms of several devices should share their statistics, as in the reference."""
    local = any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in student.modules())
    if trainer.world_size > 1 and local:
        log.warning(
            "the batch norms normalise each device's share of a batch by itself; set Trainer(sync_batchnorm=True) to "
            "have DINO's statistics over all %d devices",
            trainer.world_size,
        )


@torch.no_grad()
def check_views(views: Sequence[Tensor], student: Network) -> None:
    """Raises ValueError if the backbone cannot take one of the view sizes, or gives another width there."""
    for view in {view.shape[-2:]: view for view in views}.values():
        width = features_at(student.backbone, view[:1]).shape[1]
        if width != student.head.in_dim:
            raise ValueError(
                f"the backbone gives {width} features for {view.shape[-2]}×{view.shape[-1]} crops, but its head was made for "
                f"{student.head.in_dim}; it must pool over the positions"
            )
    backbone, (height, width) = student.backbone, views[0].shape[-2:]
    if isinstance(backbone, VisionTransformer):
        patch = backbone.patch_size
        if backbone.grid != (height // patch, width // patch):
            log.warning(
                "the global crops are %d×%d, but the positions of the ViT are laid out for %d×%d and will be interpolated; "
                "set img_size to the global crop size",
                *(height, width, backbone.grid[0] * patch, backbone.grid[1] * patch),
            )
