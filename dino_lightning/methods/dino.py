"""DINOModule: one training step of DINO (paper, algorithm 1), told in the order in which it happens."""

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dino_lightning.backbones import (
    VisionTransformer,
    build,
    example_images,
    feature_dim,
    freeze_unused,
    warn_of_classifier,
)
from dino_lightning.backbones.head import DINOHead
from dino_lightning.losses.dino import DINOLoss
from dino_lightning.methods.networks import Network, Teacher, split_views
from dino_lightning.training import resume
from dino_lightning.training.checkpoint_io import AtomicCheckpointIO
from dino_lightning.training.checks import (
    check_options,
    check_saving,
    check_trainer,
    check_views,
    finds_batch_size,
    warn_of_local_batch_norms,
)
from dino_lightning.training.guard import NonFiniteGuard
from dino_lightning.training.optim import build_optimizer, clip_each_, gradient_norms
from dino_lightning.training.plan import Plan, Unsaid, check_length
from dino_lightning.training.randomness import seeded
from dino_lightning.weights.load import start_from
from dino_lightning.weights.networks import facts_of

_NO_OPTIONS = ("self", "__class__", "backbone", "weights", "weights_with_head")
_OBJECT = "object:"  # how a backbone that was given as an object stands in the hyper-parameters


class DINOModule(LightningModule):
    """Self-distillation with no labels: a student learns to match its own moving average across views of an image.

    Trains on batches of views: a list of V ≥ 2 tensors (B, C, H, W), the first two the global crops, or (views, anything).
    Any DataLoader that yields this will do. The options and defaults are those of the reference implementation.

    Args:
        backbone: vit_tiny, vit_small, vit_base, vit_large or vit_giant; dinov2_vits14, b, l and g, with _reg for registers;
            resnet50, resnet101 and the other classification CNNs of torchvision; timm/NAME with timm installed; or any module
            that maps images (B, C, H, W) to features (B, D).
        patch_size: pixels of a ViT patch's side, e.g. 8, 14 or 16.
        img_size: pixels, int or (H, W): the size whose grid a ViT's positions have. Set it to the global crop size.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of the student (the teacher has none).
        out_dim: number of prototypes K. Fewer, such as 4096, suit small data sets and GPUs.
        hidden_dim: width of the head's MLP.
        bottleneck_dim: width of the head's L2-normalised bottleneck.
        head_layers: layers of the head's MLP.
        use_bn_in_head: batch norm in the head's MLP.
        norm_last_layer: keep the prototypes at unit norm; false is better for long runs of ViT-S, less stable.
        momentum_teacher: of the moving average at the start; a cosine brings it to 1. Small batches want more: 0.9995.
        warmup_teacher_temp: temperature of the teacher's softmax in the first epoch.
        teacher_temp: temperature of the teacher's softmax after its warm-up; above 0.07 is unstable.
        warmup_teacher_temp_epochs: epochs of the linear warm-up of the temperature.
        student_temp: temperature of the student's softmax.
        center_momentum: of the moving average of the teacher's logits.
        optimizer: adamw, sgd (momentum 0.9) or lars.
        lr: learning rate after its warm-up, for 256 images a step: it is scaled by the real number
            (batch size × devices × accumulated batches).
        min_lr: learning rate at the end, not scaled.
        warmup_epochs: epochs of the linear warm-up of the learning rate; the default becomes a tenth of a run
            that is shorter than twice that.
        weight_decay: weight decay at the start; not on biases and norms.
        weight_decay_end: weight decay at the end of its cosine.
        clip_grad: largest L2 norm of the gradient of each parameter tensor; 0 is off. The Trainer's gradient_clip_val is
            another norm (of all gradients together), and both at once are an error.
        freeze_last_layer: epochs at the start in which the prototypes stay as they are.
        weights: start from the trained backbone of this source instead of from noise, in student and teacher: a file, a
            folder or a published name, as ``load_backbone`` takes them. Its shape must be that of ``backbone``; positions are
            interpolated to ``img_size``. Checkpoints do not need the source any more.
        weights_with_head: take over the projection head and the centre of that source too.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small",
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.1,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        use_bn_in_head: bool = False,
        norm_last_layer: bool = True,
        momentum_teacher: float = 0.996,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        lr: float = 5e-4,
        min_lr: float = 1e-6,
        warmup_epochs: int = Unsaid(10),
        weight_decay: float = 0.04,
        weight_decay_end: float = 0.4,
        clip_grad: float = 3.0,
        freeze_last_layer: int = 1,
        weights: str | None = None,
        weights_with_head: bool = False,
    ) -> None:
        # Not self.hparams, in which Lightning prefers the arguments of a subclass to what it passes on to here.
        self.options = {name: value for name, value in locals().items() if name not in _NO_OPTIONS}
        super().__init__()
        check_options(self.options)
        given, backbone = backbone, _plain(backbone)  # a checkpoint holds plain types only
        self.save_hyperparameters()
        # A subclass's own argument is saved as it came in; that of a command-line run is the class path.
        for name in ("weights", "weights_with_head"):  # what is loaded from a checkpoint has the checkpoint's
            self._hparams.pop(name, None)
            self._hparams_initial.pop(name, None)
        if isinstance(warmup_epochs, Unsaid) and "warmup_epochs" in self._hparams:
            self._hparams["warmup_epochs"] = self._hparams_initial["warmup_epochs"] = int(self._hparams["warmup_epochs"])
        self._hparams["backbone"] = self._hparams_initial["backbone"] = _plain(self.hparams.get("backbone", backbone))
        if isinstance(given, str):
            given = _by_name(given, patch_size, img_size, in_chans, drop_path_rate)
        example = example_images(given, img_size, in_chans)
        freeze_unused(given, example)
        warn_of_classifier(given, example)
        head = DINOHead(
            feature_dim(given, example),
            out_dim,
            use_bn=use_bn_in_head,
            norm_last_layer=norm_last_layer,
            nlayers=head_layers,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
        )
        self.loss = DINOLoss(out_dim, student_temp, center_momentum)
        if weights is not None:
            start_from(weights, given, head if weights_with_head else None, self.loss.center)
        self.student = Network(given, head)
        self.teacher = Teacher(self.student)

        self.images: dict[str, Any] = {}  # of the global crops: size (H, W), mean, std, as far as known; kept in checkpoints
        self._plan: Plan | None = None  # known with the first batch of a run
        self._finds_batch_size = False  # whether a BatchSizeFinder tries sizes before the run
        self._seed: int | None = None  # of the student's drop path
        self._layout: dict[str, int] | None = None  # of the run that is resumed
        self._updated_step: int | None = None  # the global step up to which the teacher has followed; None outside a run
        self._optimizer_stepped = False
        self._guard = NonFiniteGuard()
        self.register_state_dict_pre_hook(_update_before_saving)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._plan is None:
            resume.count_logged_steps(self.trainer)
            views = split_views(batch)
            check_views(views, self.student)
            self.images = {"size": list(views[0].shape[-2:]), **_normalization(self.trainer.datamodule)}
            self._plan = Plan.of(self.trainer, self.options, first_batch_size=len(views[0]))
            if self._layout is not None:
                if self.trainer.is_global_zero:
                    resume.compare(self._layout, resume.layout(self.trainer, self._plan))
                self._layout = None

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One (micro-)batch → the loss, and for callbacks the teacher's entropy and the KL divergence, detached, in nats."""
        if self._plan is None:
            raise RuntimeError(
                "DINOModule trains in a Trainer, which tells it the length of the run: Trainer(...).fit(module, loader). "
                "In a loop of your own use its parts: DINOLoss, DINOHead, VisionTransformer and dino_lightning.training.schedules"
            )
        self.update_teacher()  # already done, unless a subclass overrides on_train_batch_end
        views = split_views(batch)
        teacher_temp = self._plan.teacher_temp_at(self.global_step)
        with torch.no_grad():
            teacher_logits = self.teacher(views[:2])  # (2·B, K)
        with seeded(self.device, self._seed, self.global_step, batch_idx, self.global_rank):  # for the drop path
            student_logits = self.student(views)  # (V·B, K)
        loss = self.loss(student_logits, teacher_logits, teacher_temp)
        entropy = self.loss.teacher_entropy
        kl = loss.detach() - entropy
        self.log_dict({"train/loss": loss.detach(), "train/teacher_entropy": entropy, "train/kl": kl})
        return {"loss": loss, "teacher_entropy": entropy, "kl": kl}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]) -> None:
        """Sets the learning rate and (of group 0, the decayed one) the weight decay; steps without a frozen last layer."""
        for group in optimizer.param_groups:
            group["lr"] = self._plan.lr_at(self.global_step)
        optimizer.param_groups[0]["weight_decay"] = self._plan.weight_decay_at(self.global_step)

        def closure() -> Any:
            result = optimizer_closure()  # forward and backward; the gradients are those of all ranks then
            if self._plan.epoch(self.global_step) < self.options["freeze_last_layer"]:
                for parameter in self.student.head.last_layer.parameters():
                    parameter.grad = None  # not zero: the optimizer must skip decay and moments too
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._log_host(
            {
                "train/lr": self._plan.lr_at(self.global_step),
                "train/weight_decay": self._plan.weight_decay_at(self.global_step),
                "train/momentum": self._plan.momentum_at(self.global_step),
                "train/teacher_temp": self._plan.teacher_temp_at(self.global_step),
                "train/skipped_steps": self._skipped_steps,
            }
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each gradient by its own norm."""
        gradients, norms = gradient_norms(self.student.parameters())
        norm = torch.stack(norms).norm()
        self._grad_norm = torch.where(norm.isfinite(), norm, self._grad_norm)
        self.log("train/grad_norm", norm)
        if self.options["clip_grad"] > 0:
            clip_each_(gradients, norms, self.options["clip_grad"])
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.update_teacher()

    def update_teacher(self) -> None:
        """Moves the teacher and the centre, once per optimizer step however often it is called (paper, section 3.1).

        Called at the end of every batch, and before a state dict is taken, since callbacks save step checkpoints earlier than
        that. A step that a gradient scaler skipped moves neither.

        Raises:
            NonFiniteLossError: on all ranks, if the loss of the step before was not finite on any.
        """
        if self._updated_step is None or self._updated_step == self.global_step:
            return
        self._guard.check(self._trainer)
        step, self._updated_step = self.global_step - 1, self.global_step
        stepped, self._optimizer_stepped = self._optimizer_stepped, False
        non_finite = self.loss.update_center(skip=not stepped)
        if stepped:
            self.teacher.follow(self.student, self._plan.momentum_at(step))
        else:
            self._skipped_steps += 1
        if non_finite is not None:
            self._guard.watch(non_finite, self._report(step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fused = _may_fuse(self.trainer)
        return build_optimizer(
            self.options["optimizer"], self.student, weight_decay=self.options["weight_decay"], fused=fused
        )

    def configure_callbacks(self) -> list[Callback]:
        """Adds none; but it is the first hook of a run, and what is refused here leaves nothing behind, not even a logger's folder."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer(self.trainer, self.options["clip_grad"])
        return []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_trainer(self.trainer, self.options["clip_grad"])
            self._finds_batch_size = finds_batch_size(self.trainer)
            if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that the user chose
                self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
                if self.trainer.is_global_zero:
                    resume.sweep_partial_checkpoints(self.trainer)
            # The teacher is meant to be in evaluation mode.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def on_train_start(self) -> None:
        self.trainer.accumulate_grad_batches = resume.accumulated_batches(self.trainer)
        if self.trainer.callbacks or not self._finds_batch_size:  # no trial of a batch size, which is a few steps and saves nothing
            check_length(self.trainer, self.options)
            check_saving(self.trainer)
        warn_of_local_batch_norms(self.trainer, self.student)
        # Whatever mode they came in: a student in evaluation mode would have no drop path, a loss in it no centre.
        self.student.train()
        self.loss.train()
        self.loss.reset()
        if self._seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
            self._seed = self.trainer.strategy.broadcast(seed)
        resume.forget_no_saved_step(self.trainer)
        self._plan = None
        self._updated_step = self.global_step
        self._optimizer_stepped = False
        self._skipped_steps = 0
        self._grad_norm = torch.zeros((), device=self.device)  # the last finite one
        self._guard = NonFiniteGuard()
        # A gradient scaler skips the optimizer's step without saying so; the optimizer itself knows whether it stepped.
        for optimizer in self.trainer.optimizers:
            optimizer.register_step_post_hook(self._note_step)

    def on_validation_start(self) -> None:
        self.update_teacher()
        self._guard.check(self._trainer)

    def on_validation_end(self) -> None:
        if self.trainer.validating and not self.trainer.callback_metrics:
            rank_zero_info("nothing was measured; the callback dino_lightning.callbacks.OnlineKNN computes the k-NN accuracy")

    def on_train_end(self) -> None:
        self.update_teacher()
        self._guard.check(self._trainer)
        self._updated_step = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.check(self._trainer)
        checkpoint["drop_path_seed"] = self._seed
        checkpoint["images"] = self.images
        if isinstance(self.teacher.backbone, VisionTransformer):
            checkpoint["dino_lightning"] = facts_of(self.teacher.backbone)
        layout = resume.layout(self.trainer, self._plan) if self._plan is not None else self._layout
        if layout is not None:
            checkpoint["layout"] = layout

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seed = checkpoint.get("drop_path_seed")
        self.images = checkpoint.get("images", {})
        if self._trainer is not None:  # a run that goes on, not a module that is loaded
            self._layout = checkpoint.get("layout")
            resume.place(checkpoint, self.trainer)
            for state in checkpoint.get("optimizer_states", ()):
                for group in state["param_groups"]:  # the precision and the device may be others than before
                    if "fused" in group:
                        group["fused"] = _may_fuse(self.trainer)
        else:
            self._keep_class_path(checkpoint.get("hyper_parameters", {}))

    def _keep_class_path(self, saved: dict[str, Any]) -> None:
        """A backbone that the command line built came in as an object: its class path, with which what is saved next loads too."""
        if isinstance(saved.get("backbone"), dict):  # not one that load_from_checkpoint was given
            self._hparams["backbone"] = self._hparams_initial["backbone"] = saved["backbone"]
            self._hparams["_instantiator"] = saved["_instantiator"]

    @property
    def backbone_name(self) -> str | None:
        """By what name the backbone was built; None if it was given as an object."""
        name = self.hparams.get("backbone")
        return name if isinstance(name, str) and not name.startswith(_OBJECT) else None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → features of the teacher's backbone (B, D)."""
        return self.teacher.features(images)

    def as_backbone(self, trainable: bool = False) -> nn.Module:
        """A copy of the teacher's backbone for a network of your own, in evaluation mode: images (B, C, H, W) → (B, D).

        A ``VisionTransformer`` gives class and patch tokens of any blocks by ``forward_features``.

        Args:
            trainable: whether its parameters require gradients; call ``train()`` for stochastic depth.
        """
        return copy.deepcopy(self.teacher.backbone).eval().requires_grad_(trainable)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """(images, labels) of the bank (loader 0) or the queries (loader 1) → their features and labels, for callbacks."""
        images, labels = batch[:2]
        return {"features": self(images), "labels": labels}

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Any]:
        """(images, paths) → (features (B, D), paths)."""
        images, paths = batch
        return self(images), paths

    def _note_step(self, *_: Any) -> None:
        self._optimizer_stepped = True

    def _log_host(self, values: dict[str, float]) -> None:
        # Tensors on the host: a float would be copied to the device, which waits for it.
        self.log_dict({name: torch.tensor(float(value)) for name, value in values.items()})

    def _report(self, step: int) -> Callable[[], str]:
        """What to say of this step should its loss turn out not to be finite; reads from the device only then."""
        plan = self._plan
        return lambda: (
            f"the loss was not finite at step {step} (epoch {plan.epoch(step)}), with teacher temperature "
            f"{plan.teacher_temp_at(step):.4g}, learning rate {plan.lr_at(step):.4g}, norm of the centre "
            f"{self.loss.center.norm().item():.4g}, last finite gradient norm {self._grad_norm.item():.4g}"
        )


def _may_fuse(trainer: Trainer) -> bool:
    """Whether the optimizer's step may be one kernel: not under a gradient scaler, which it would undo after the clipping."""
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return not scaled and trainer.strategy.root_device.type in ("cpu", "cuda")


def _normalization(data: Any) -> dict[str, list[float]]:
    """Mean and standard deviation of the images of a data module, where it tells."""
    told = {name: getattr(data, name, None) for name in ("mean", "std")}
    return {name: [float(value) for value in values] for name, values in told.items() if isinstance(values, list | tuple)}


def _plain(backbone: Any) -> Any:
    """How a backbone stands in the hyper-parameters: a name and a class path as they are, an object by its type."""
    if isinstance(backbone, nn.Module):
        return f"{_OBJECT}{type(backbone).__module__}.{type(backbone).__qualname__}"
    return backbone


def _by_name(name: str, patch_size: int, img_size: int | tuple[int, int], in_chans: int, drop_path_rate: float) -> nn.Module:
    if name.startswith(_OBJECT):
        raise ValueError(
            f"this checkpoint was trained with a backbone given as an object ({name.removeprefix(_OBJECT)}), which it does "
            "not hold; pass it: DINOModule.load_from_checkpoint(path, backbone=...)"
        )
    return build(
        name, patch_size=patch_size, img_size=img_size, in_chans=in_chans, drop_path_rate=drop_path_rate
    )


def _update_before_saving(module: DINOModule, *_: Any) -> None:
    """Callbacks save step checkpoints before the module's own hook runs."""
    module.update_teacher()
