"""What is refused before the first step, each with the remedy."""

import logging
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lightning.backbones import VisionTransformer, features_at
from dino_lightning.backbones.vit import patch_grid
from dino_lightning.training.sharding import ShardedStrategy, is_sharded

log = logging.getLogger(__name__)

_HALF = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of another type or outside its range, naming it, its value and what would be right."""
    for names, fits, wanted in _WANTED:
        for name in [name for name in names if name in options]:
            if not fits(options[name]):
                raise ValueError(f"{name} must {wanted}, got {options[name]!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    return len(sides) == 2 and all(_is_integer(side) and side > 0 for side in sides)


def _is_range(value: Any) -> bool:
    sides = list(value) if isinstance(value, list | tuple) else []
    return len(sides) == 2 and all(map(_is_number, sides)) and 0 <= sides[0] <= sides[1] <= 1


_AT_LEAST_ONE = (
    "patch_size", "in_chans", "out_dim", "hidden_dim", "bottleneck_dim", "head_layers", "ibot_out_dim", "ibot_hidden_dim",
    "ibot_bottleneck_dim", "decoder_dim", "decoder_depth", "decoder_heads",
    "projection_dim",
)  # fmt: skip
_COUNTS = ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer", "freeze_backbone_epochs", "registers")
_NOT_NEGATIVE = (
    "lr", "min_lr", "weight_decay", "weight_decay_end", "clip_grad", "dino_loss_weight", "ibot_loss_weight", "koleo_loss_weight",
    "patch_embed_lr_mult",
)  # fmt: skip
_POSITIVE = ("teacher_temp", "warmup_teacher_temp", "student_temp", "layerwise_decay", "temperature")
_SHARES = ("momentum_teacher", "center_momentum", "mask_probability", "masking_ratio")
_SWITCHES = (
    "use_bn_in_head", "compile", "activation_checkpointing", "norm_last_layer", "ibot_separate_head", "freeze_patch_embed", "normalize_pixels",
)  # fmt: skip
_WORDS = {"optimizer": ("adamw", "sgd", "lars"), "centering": ("centering", "sinkhorn_knopp"), "ffn": ("mlp", "swiglu")}
_WANTED = (  # NaN fits none of the ranges
    ((*_AT_LEAST_ONE, *_COUNTS), _is_integer, "be an integer"),
    ((*_NOT_NEGATIVE, *_POSITIVE, *_SHARES, "drop_path_rate"), _is_number, "be a number"),
    (_SWITCHES, lambda value: isinstance(value, bool), "be true or false"),
    (("img_size",), _is_size, "be pixels, an integer or (height, width)"),
    *(((name,), words.__contains__, f"be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}") for name, words in _WORDS.items()),
    (_AT_LEAST_ONE, lambda value: value >= 1, "be at least 1"),
    ((*_COUNTS, *_NOT_NEGATIVE), lambda value: value >= 0, "not be negative"),
    (_POSITIVE, lambda value: value > 0, "be positive"),
    (_SHARES, lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    (("drop_path_rate",), lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (("layer_scale",), lambda value: value is None or (_is_number(value) and value > 0), "be a positive number or null"),
    (("mask_ratio", "betas"), _is_range, "be two numbers of [0, 1], the smaller first"),
)


def check_trainer(trainer: Trainer, clip_grad: float) -> None:
    """Raises ValueError for settings of the Trainer that would train something else than the method."""
    if trainer.precision in _HALF:
        raise ValueError(
            f"precision={trainer.precision!r} keeps the teacher in half precision, where its moving average stalls: the "
            "updates are smaller than the rounding. Use 'bf16-mixed', '16-mixed' or '32-true'"
        )
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            "manual optimization leaves out what the plan does at each step (rates, clipping, frozen parts); leave automatic_optimization true, "
            "or use the parts in a loop of your own: DINOLoss, DINOHead, dino_lightning.training.schedules"
        )
    if trainer.lightning_module._compiler_ctx is not None:
        raise ValueError(
            "torch.compile(module) would compile the training step anew at every step, since its schedules read the global step; pass "
            "the module itself, built with compile=True (or call module.compile(), with options of torch.compile)"
        )
    sharding = isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)
    if sharding and not isinstance(trainer.strategy, ShardedStrategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} shards the weights otherwise than the moving average of a teacher and checkpoints in one "
            "file need; use strategy='sharded', which is FSDP2, or 'ddp'"
        )
    for callback in trainer.callbacks:
        reason = _refused(callback)
        if reason is not None:
            raise ValueError(f"{type(callback).__name__} {reason}")
    if clip_grad > 0 and trainer.gradient_clip_val:
        raise ValueError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips the norm of all gradients together, "
            f"clip_grad={clip_grad} as the method does (DINO: of each tensor; DINOv2: of each part); set one of them to 0"
        )


def check_sharded(trainer: Trainer, options: Mapping[str, Any], network: nn.Module) -> None:
    """Raises ValueError for what does not work on shards of the trained network."""
    if not is_sharded(trainer):
        return
    wrong = {
        "optimizer='lars', whose step is scaled by norms of whole tensors; use adamw or sgd": options.get("optimizer") == "lars",
        "compile=true": bool(options.get("compile")),
        "precision='16-mixed'; use bf16-mixed": trainer.precision == "16-mixed",
        "batch norms, whose statistics no strategy of FSDP2 shares; use ddp, or a ViT with a head without them": any(
            isinstance(module, _BatchNorm) for module in network.modules()
        ),
    }
    for what, is_asked in wrong.items():
        if is_asked:
            raise ValueError(f"strategy='sharded' does not go with {what}")


def _refused(callback: Callback) -> str | None:
    """Why a callback of Lightning's would not do here what it says, and what does; None if it does."""
    if isinstance(callback, LearningRateFinder):
        return (
            "(Tuner.lr_find) cannot find a learning rate here: the plan sets the rate at every step, and where the loss of DINO falls "
            "fastest it collapses. Try several lr and compare the k-NN accuracy, as configs/sweeps/knn.yaml does, with a new Trainer "
            "that is without it"
        )
    if isinstance(callback, StochasticWeightAveraging):
        return (
            "does not apply: the plan sets the learning rate at every step, not its swa_lrs, and the teacher already is the average "
            "of the weights, which is what is evaluated and exported. Leave it out; momentum_teacher says how far it averages"
        )
    if isinstance(callback, GradientAccumulationScheduler) and len(set(callback.scheduling.values())) > 1:
        return (
            f"with scheduling={callback.scheduling} changes the steps of an epoch and the images of a step during the run, for which "
            "the schedules and the learning rate are planned. Set Trainer(accumulate_grad_batches=...), one number for the run"
        )
    return None


def finds_batch_size(trainer: Trainer) -> bool:
    """Whether the run begins with the trials of Lightning's BatchSizeFinder (Tuner.scale_batch_size), which have no callbacks."""
    return any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks)


def check_saving(trainer: Trainer) -> None:
    """Raises ValueError if a checkpoint could be written in the middle of accumulated batches."""
    window, interval, epoch = trainer.accumulate_grad_batches, trainer.val_check_batch, trainer.num_training_batches
    if window == 1:
        return
    if any(getattr(callback, "_train_time_interval", None) for callback in trainer.checkpoint_callbacks):
        raise ValueError(
            f"ModelCheckpoint(train_time_interval=...) may save in the middle of a step of accumulate_grad_batches={window}, "
            "where a checkpoint cannot be resumed exactly; use every_n_train_steps, or dino_lightning.callbacks.SaveEvery"
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


def warn_of_slow_precision(trainer: Trainer) -> None:
    """Half precisions that a GPU computes slowly."""
    device = trainer.strategy.root_device
    if device.type != "cuda" or not trainer.precision.startswith("bf16"):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        log.warning(
            "%s has no units for bfloat16 (compute capability %d.%d, it takes 8.0): precision=%r is slow there; use --trainer.precision "
            "16-mixed",
            torch.cuda.get_device_name(device),
            *capability,
            trainer.precision,
        )


def warn_of_local_batch_norms(trainer: Trainer, student: nn.Module) -> None:
    """Batch norms of several devices should share their statistics, as in the reference."""
    local = any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in student.modules())
    if trainer.world_size > 1 and local and trainer.is_global_zero:
        on_gpus = trainer.strategy.root_device.type == "cuda"
        log.warning(
            "the batch norms normalise each device's share of a batch by itself, where the reference has statistics over all %d devices; %s",
            trainer.world_size,
            "set Trainer(sync_batchnorm=True)" if on_gpus else "synchronised ones (sync_batchnorm) need GPUs",
        )


def check_crops(backbone: nn.Module, crops: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError for crops that the patches of a ViT do not divide.

    Args:
        backbone: any; only of a ViT it is known what it takes.
        crops: their sizes (H, W) in pixels, by the names of the options.
    """
    for option, size in crops.items():
        try:
            patch_grid(*size, backbone.patch_size if isinstance(backbone, VisionTransformer) else 1)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error


@torch.no_grad()
def check_views(views: Sequence[Tensor], backbone: nn.Module, width: int) -> None:
    """Raises ValueError if the backbone cannot take one of the view sizes, or gives another width there."""
    for view in {view.shape[-2:]: view for view in views}.values():
        found = features_at(backbone, view[:1]).shape[1]
        if found != width:
            raise ValueError(
                f"the backbone gives {found} features for {view.shape[-2]}×{view.shape[-1]} crops, but its head was made for "
                f"{width}; it must pool over the positions"
            )
    height, width = views[0].shape[-2:]
    if isinstance(backbone, VisionTransformer):
        patch = backbone.patch_size
        if backbone.grid != (height // patch, width // patch):
            log.warning(
                "the global crops are %d×%d, but the positions of the ViT are laid out for %d×%d and will be interpolated; "
                "set img_size to the global crop size",
                *(height, width, backbone.grid[0] * patch, backbone.grid[1] * patch),
            )


def warn_of_own_optimizers(module: LightningModule, is_own: bool) -> None:
    """Says what a plan makes of optimizers that it did not build (``is_own``), and which parameters no optimizer holds."""
    optimizers = module.trainer.optimizers
    held = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    forgotten = [name for name, parameter in module.named_parameters() if parameter.requires_grad and id(parameter) not in held]
    if forgotten:
        rank_zero_warn(
            f"never trained, because no optimizer holds them: {', '.join(forgotten[:5])}{' and more' * (len(forgotten) > 5)}; override "
            "build_optimizer(fused) and add a group with them"
        )
    if is_own or module.trainer.lr_scheduler_configs:
        rank_zero_warn(
            "the plan sets the learning rate of all groups and the weight decay of the first one at every step: what configure_optimizers says "
            "of these, and schedulers, have no effect. Set lr, weight_decay and so on of the module, or override set_rates(groups, step)"
        )
