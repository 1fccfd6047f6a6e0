"""FineTune: a backbone and a linear classifier trained together on labelled images."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dino_lightning.backbones import VisionTransformer, example_images, feature_dim, freeze_unused
from dino_lightning.classifiers.classification import Standing, Standings, accuracies, cross_entropy, linear_head, without_repeats
from dino_lightning.training.optim import is_decayed
from dino_lightning.training.plan import count_steps, images_per_step
from dino_lightning.training.randomness import seeded
from dino_lightning.training.schedules import cosine_schedule

log = logging.getLogger(__name__)


class FineTune(LightningModule):
    """Trains a backbone further, with one linear classifier on its features: AdamW, a learning rate that falls from block to
    block towards the input, label smoothing, linear warm-up and cosine per step.

    Trains on (images (B, C, H, W), labels (B,)), normalised as for the backbone; samples with label -1 are left out. Logs
    ``train/loss``, ``val/finetune_top1`` and ``val/finetune_top5`` (fractions), ``test/...`` in a test run. ``module(images)`` gives
    logits (B, K).

    Args:
        backbone: maps images to features (B, D). All of it is trained (freeze parts of it afterwards, if wanted), with the
            stochastic depth that it has. Its weights, but not its shape, are in checkpoints:
            ``FineTune.load_from_checkpoint(path, backbone=...)``.
        num_classes: number of classes.
        lr: learning rate of the classifier and the final norm, for 256 images a step: it is scaled by the real number (batch
            size × devices × accumulated batches).
        layer_decay: factor from one block to the one before it, in a ViT of this package; with another backbone all is one
            group, whose learning rate is ``lr``, and the log says so.
        min_lr: learning rate at the end, for 256 images a step; it falls from block to block as ``lr`` does.
        warmup_epochs: epochs of the linear warm-up of the learning rate.
        weight_decay: not on biases and one-dimensional tensors.
        label_smoothing: share of the target that is spread over all classes.
        seed: of the stochastic depth.
        classes: their names, if given kept in checkpoints as the hyper-parameter "classes".
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        lr: float = 5e-4,
        layer_decay: float = 0.75,
        min_lr: float = 1e-6,
        warmup_epochs: int = 5,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _check_options(lr, layer_decay, min_lr, warmup_epochs, weight_decay, label_smoothing)
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone.requires_grad_(True)
        example = example_images(backbone, 224, 3)
        freeze_unused(backbone, example)
        self.head = linear_head(feature_dim(backbone, example), num_classes)
        self.metrics = accuracies(num_classes)
        self.standings = Standings(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, K)."""
        return self.head(self.backbone(images))

    def on_fit_start(self) -> None:
        self.train()  # the backbone may have come in evaluation mode, that is without stochastic depth

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch[:2]
        with seeded(self.device, self.hparams.seed, self.global_step, batch_idx, self.global_rank):  # for the drop path
            logits = self(images)
        loss = cross_entropy(logits, labels, self.hparams.label_smoothing)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch[:2]
        labels = without_repeats(labels, self.trainer, batch_idx)
        self.metrics.update(self(images).float(), labels)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _log(self, stage: str) -> None:
        values = self.metrics.compute()
        self.metrics.reset()
        if self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == "fit":
            self.standings.note(self.current_epoch, torch.stack([values["top1"], values["top5"]])[None])
        self.log_dict({f"{stage}/finetune_{name}": value for name, value in values.items()}, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.hparams
        self.trainer.fit_loop.setup_data()  # else the loader is not there yet
        total_steps, steps_per_epoch = count_steps(self.trainer)
        warmup_steps = options.warmup_epochs * steps_per_epoch
        if warmup_steps > total_steps and not self.trainer.fast_dev_run:
            raise ValueError(
                f"warmup_epochs={options.warmup_epochs} is {warmup_steps} steps, but the run has only {total_steps}; "
                "shorten the warm-up or train longer"
            )
        lr = options.lr * images_per_step(self.trainer) / 256
        groups = layer_groups(self.backbone, self.head, layer_decay=options.layer_decay, weight_decay=options.weight_decay)
        for group in groups:
            group["lr"] = lr * group.pop("lr_scale")
        optimizer = torch.optim.AdamW(groups, lr=lr)

        def factor(step: int) -> float:
            return cosine_schedule(
                step,
                base_value=1.0,
                final_value=options.min_lr / options.lr,
                total_steps=total_steps,
                warmup_steps=min(warmup_steps, total_steps),
            )

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def results(self) -> Standing:
        """What it reached on the validation data, in the last epoch and in the best.

        Raises:
            RuntimeError: before the first validated epoch.
        """
        return self.standings.read()[0]


def layer_groups(backbone: nn.Module, head: nn.Module, *, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with ``weight_decay`` and ``lr_scale``, the trainable parameters by layer, decayed or not.

    In a ViT of depth L the embeddings are layer 0, block i (from 0) is layer i + 1, and the final norm and the head are layer
    L + 1, with lr_scale 1; below, it is layer_decay^(L + 1 − layer). Other backbones are not divided.
    """
    is_vit = isinstance(backbone, VisionTransformer)
    top = len(backbone.blocks) + 1 if is_vit else 0
    if not is_vit and layer_decay != 1:
        log.warning(
            "layer_decay=%g is not used: a %s has no blocks that are known here; all of it has the learning rate of the head",
            *(layer_decay, type(backbone).__name__),
        )
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for module in (backbone, head):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                layer = _layer(name, top) if is_vit and module is backbone else top
                groups.setdefault((layer, is_decayed(name, parameter)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": layer_decay ** (top - layer)}
        for (layer, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _layer(name: str, top: int) -> int:
    """Of a ViT's parameter."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        return int(rest.partition(".")[0]) + 1
    return top if part == "norm" else 0


def _check_options(lr: float, layer_decay: float, min_lr: float, warmup_epochs: int, weight_decay: float, label_smoothing: float) -> None:
    if not 0 <= min_lr <= lr or lr == 0:
        raise ValueError(f"lr must be positive and min_lr at most as large, got lr={lr}, min_lr={min_lr}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}; 1 is off")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if warmup_epochs < 0 or weight_decay < 0:
        raise ValueError(f"warmup_epochs and weight_decay must not be negative, got {warmup_epochs} and {weight_decay}")
