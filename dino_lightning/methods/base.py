"""What every pre-training method shares: the plan of a run, the optimizer's step, exact resume, features out."""

import copy
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dino_lightning.backbones import (
    VisionTransformer,
    build,
    example_images,
    feature_dim,
    freeze_unused,
    warn_of_classifier,
)
from dino_lightning.evaluation.flops import count_flops
from dino_lightning.methods import METHODS
from dino_lightning.methods.batch import images_and_rest, labelled_images, split_views
from dino_lightning.methods.networks import Network
from dino_lightning.training import resume
from dino_lightning.training.checkpoint_io import AtomicCheckpointIO
from dino_lightning.training.checks import (
    check_options,
    check_saving,
    check_sharded,
    check_trainer,
    check_views,
    finds_batch_size,
    warn_of_local_batch_norms,
    warn_of_own_optimizers,
    warn_of_slow_precision,
)
from dino_lightning.training.devices import settle
from dino_lightning.training.guard import NonFiniteGuard
from dino_lightning.training.optim import build_optimizer, clip_together_, gradient_norms, param_groups
from dino_lightning.training.plan import Plan, Unsaid, check_length, count_steps, images_per_step
from dino_lightning.training.sharding import is_sharded, shard
from dino_lightning.weights.networks import facts_of

log = logging.getLogger(__name__)

_NO_OPTIONS = ("self", "__class__", "given", "backbone", "weights", "weights_with_head")
_OBJECT = "object:"  # how a backbone that was given as an object stands in the hyper-parameters


class Observed(NamedTuple):
    """What a training step saw, for callbacks: ``features`` (2·B, D) of the evaluated network for the global crops, views-major;
    where the method has prototypes, ``logits`` (2·B, K) or distributions over them, and a ``center`` (1, K) yet to be subtracted.
    """

    features: Tensor
    logits: Tensor | None = None
    center: Tensor | None = None


class Method(LightningModule):
    """A pre-training method: trains on batches of views, a list of V ≥ 2 tensors (B, C, H, W), the first two the global crops.

    A method gives its networks (``trained``, ``evaluated``), a ``training_step``, and as far as it has them ``after_step`` (what
    moves after an optimizer step), ``begin_run``, ``frozen_parts``, its ``clip`` and its own ``Plan``. All else is here.

    Attributes:
        options: the arguments of the method, except the backbone and the weights that it started from.
        key: (seed, step, micro-batch, rank) of the training step under way, by which its random numbers are drawn.
        images: of the global crops: size (H, W), mean and std, as far as known; kept in checkpoints.
        observed: of the training step under way, for callbacks.
        backbone_shape: arguments of ``backbones.build``, of a backbone given by name.
        started_from: the source of the weights that it began with, if it was not noise.
    """

    method: ClassVar[str]  # its name behind --method and in checkpoints
    title: ClassVar[str]  # its name for people
    plan_type: ClassVar[type[Plan]] = Plan
    data: ClassVar[dict[str, Any]] = {}  # options of MultiCropDataModule that it wants other than they are by default

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """``arguments``: the ``locals()`` of the method's own ``__init__``, in which ``backbone`` is ``plain`` already."""
        super().__init__()
        # Not self.hparams, in which Lightning prefers the arguments of a subclass to what it passes on to here.
        self.options = {name: value for name, value in arguments.items() if name not in _NO_OPTIONS}
        check_options(self.options)
        # A subclass's own argument is saved as it came in; that of a command-line run is the class path.
        self.save_hyperparameters(frame=inspect.currentframe().f_back)
        # What is loaded from a checkpoint has its weights; a default that gives way must not come back as one that was asked for.
        for name in ("weights", "weights_with_head", *(name for name in self._hparams if isinstance(self._hparams[name], Unsaid))):
            self._hparams.pop(name, None)
            self._hparams_initial.pop(name, None)
        self._hparams["backbone"] = self._hparams_initial["backbone"] = plain(self.hparams.get("backbone", arguments["backbone"]))

        self.started_from: str | None = arguments["weights"]
        self.backbone_shape: dict[str, Any] = {}
        self.images: dict[str, Any] = {}
        self.observed: Observed | None = None
        self._plan: Plan | None = None  # known with the first batch of a run
        self._finds_batch_size = False  # whether a BatchSizeFinder tries sizes before the run
        self._seed: int | None = None  # of what is drawn in a step, such as drop path
        self._layout: dict[str, int] | None = None  # how the run deals out its images
        self._resumed: dict[str, int] | None = None  # the same of the run that goes on
        self._finished_step: int | None = None  # the global step up to which all has moved; None outside a run
        self._rated_step = -1  # the newest one whose rates were set
        self._optimizer_stepped = False
        self._guard = NonFiniteGuard()
        self.register_state_dict_pre_hook(_finish_before_saving)

    def build_backbone(self, backbone: str | nn.Module, used: Sequence[str] = (), **more: Any) -> nn.Module:
        """The backbone, built by the method's options and ``more`` of ``backbones.build`` where it is a name.

        Parameters on which the features do not depend are frozen, but for those that the method has ``used`` otherwise.

        Raises:
            TypeError: if it is neither a name nor a module.
            ValueError: if the name is that of an object in a checkpoint, which it does not hold; for activation checkpointing of a network
                of others.
        """
        shape = {name: self.options[name] for name in ("patch_size", "img_size", "in_chans", "drop_path_rate")}
        if isinstance(backbone, str):
            if is_object(backbone):
                raise ValueError(
                    f"this checkpoint was trained with a backbone given as an object ({backbone.removeprefix(_OBJECT)}), which it "
                    f"does not hold; pass it: {type(self).__name__}.load_from_checkpoint(path, backbone=...)"
                )
            self.backbone_shape = {**shape, **more}
            backbone = build(backbone, **self.backbone_shape)
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a name, such as vit_small, or a module that maps images to features, got {backbone!r}")
        example = example_images(backbone, shape["img_size"], shape["in_chans"])
        freeze_unused(backbone, example, used)
        warn_of_classifier(backbone, example)
        self._width = feature_dim(backbone, example)
        if self.options.get("activation_checkpointing"):
            if not isinstance(backbone, VisionTransformer):
                raise ValueError(
                    f"activation_checkpointing is for the VisionTransformer of this package, and the backbone is a {type(backbone).__name__}; "
                    "leave it out, and switch it on in that network if it has it (timm: set_grad_checkpointing())"
                )
            backbone.activation_checkpointing = True
        return backbone

    @property
    def trained(self) -> Network:
        """The network that gradients train."""
        raise NotImplementedError

    @property
    def evaluated(self) -> Network:
        """The network whose backbone is evaluated and handed on: the teacher where there is one."""
        return self.trained

    def compile(self, **options: Any) -> None:
        """Compiles the backbones of the method's networks in place (``Network.compile``); options of ``torch.compile``."""
        for network in {self.trained, self.evaluated}:
            network.compile(**options)

    def learning_rate(self, images: int) -> float:
        """``lr`` for this many images a step."""
        return self.options["lr"] * images / 256

    def after_step(self, step: int, stepped: bool, non_finite: Tensor) -> None:
        """Moves what is not trained by gradients, once for each optimizer step.

        Args:
            step: global step, counted from 0.
            stepped: false if a gradient scaler skipped the step, and nothing must move.
            non_finite: scalar on the device, how many losses of the step were not finite, over all ranks.
        """

    def begin_run(self) -> None:
        """Prepares for the first step: losses in training mode, nothing left in them of an earlier run."""

    def frozen_parts(self, step: int) -> Iterable[nn.Module]:
        """Parts of the trained network that this step leaves as they are, moments and decay too."""
        return ()

    def set_rates(self, groups: list[dict[str, Any]], step: int) -> None:
        """Sets the learning rate and (of group 0, the decayed one) the weight decay of a step."""
        for group in groups:
            group["lr"] = self.plan.lr_at(step)
        groups[0]["weight_decay"] = self.plan.weight_decay_at(step)

    def build_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        """That of the option ``optimizer``, over the trained parameters in two groups, decayed and not; ``fused``, if it may be."""
        groups = param_groups(self.trained, self.options["weight_decay"])
        return build_optimizer(self.options["optimizer"], groups, fused=fused)

    def clip(self, gradients: list[Tensor], norms: list[Tensor], max_norm: float) -> None:
        """Clips the gradients in place, by the norm of all together; ``norms`` are those of each."""
        clip_together_(gradients, norms, max_norm)

    def flops_per_image(self, views: Sequence[Tensor]) -> int:
        """Floating-point operations of a training step for one image, given its views (1, C, H, W)."""
        return 3 * count_flops(self.trained, lambda: self.trained(views))

    def state_at(self, step: int) -> dict[str, float]:
        """Numbers of the method, by what they are called, to name where a step's loss was not finite; may read from the device."""
        return {}

    @property
    def plan(self) -> Plan:
        """The plan of the run under way.

        Raises:
            RuntimeError: outside a Trainer's fit.
        """
        if self._plan is None:
            if self._trainer is not None and self._trainer.training:
                overrides = type(self).on_train_batch_start is not Method.on_train_batch_start
                raise RuntimeError(
                    "the plan of a run is made in the module's on_train_batch_start, with the first batch"
                    + f"; {type(self).__name__} overrides that: call super() in it" * overrides
                )
            raise RuntimeError(
                f"{type(self).__name__} trains in a Trainer, which tells it the length of the run: Trainer(...).fit(module, loader). "
                "In a loop of your own use the parts: DINOLoss, DINOHead, VisionTransformer, dino_lightning.losses and "
                "dino_lightning.training.schedules"
            )
        return self._plan

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._finished_step is None:
            raise RuntimeError(f"{type(self).__name__} overrides on_train_start; call super().on_train_start() in it")
        self.finish_step()  # already done, unless a subclass overrides on_train_batch_end
        self.observed = None
        self.key = (self._seed, self.global_step, batch_idx, self.global_rank)
        if self._plan is not None:
            return
        resume.count_logged_steps(self.trainer)
        views = split_views(batch)
        check_views(views, self.trained.backbone, self._width)
        if len(views) > 2 and self.data.get("local_crops_number") == 0:
            log.warning(
                "%s has no use for the %d local views of each image; leave them out by local_crops_number=0", self.title, len(views) - 2
            )
        self.images = {"size": list(views[0].shape[-2:]), **_normalization(self.trainer.datamodule)}
        total, in_epoch = count_steps(self.trainer)
        images = images_per_step(self.trainer, first_batch_size=len(views[0]))
        self._plan = self.plan_type.of(self.options, total, in_epoch, self.learning_rate(images))
        self._layout = resume.layout(self.trainer, self._plan, images)
        before, self._resumed = self._resumed, None
        if before is not None and self.trainer.is_global_zero:
            resume.warn_of_changes(before, self._layout)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]) -> None:
        """Sets what the plan says of the step, and steps without the frozen parts."""
        step = self._rated_step = self.global_step
        self.set_rates(optimizer.param_groups, step)

        def closure() -> Any:
            result = optimizer_closure()  # forward and backward; the gradients are those of all ranks then
            for part in self.frozen_parts(step):
                for parameter in part.parameters():
                    parameter.grad = None  # not zero: the optimizer must skip decay and moments too
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def report(self, numbers: Mapping[str, Tensor]) -> None:
        """Logs numbers of a training step (scalars) as ``train/NAME``: what ``log_dict`` does, in a tenth of the host's time.

        Most of the time of Lightning's ``log`` goes into making sure that a number is registered, as it is from the first step on.
        """
        registered = self.trainer._results or {}
        for name, value in numbers.items():
            key = f"{self._current_fx_name}.train/{name}"
            if key in registered:
                registered.update_metrics(key, value.detach(), batch_size=1)
            else:
                self.log(f"train/{name}", value)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        values = {**self.plan.values_at(self.global_step), "skipped_steps": self._skipped_steps}
        # Tensors on the host: a float would be copied to the device, which waits for it.
        self.report({name: torch.tensor(float(value)) for name, value in values.items()})

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the method does, or as the Trainer says where ``clip_grad`` is 0."""
        gradients, norms = gradient_norms(self.trained.parameters())
        if not norms:  # a training step that gave None
            return
        norm = torch.stack(norms).norm()
        self._grad_norm = torch.where(norm.isfinite(), norm, self._grad_norm)
        self.report({"grad_norm": norm})
        if self.options["clip_grad"] > 0:
            self.clip(gradients, norms, self.options["clip_grad"])
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._guard.count(loss)  # not in on_before_backward, which people override without super()
        super().backward(loss, *args, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.finish_step()

    def finish_step(self) -> None:
        """Moves what moves after an optimizer step (``after_step``), once however often it is called.

        Called at the end of every batch, at the beginning of the next one, and before a state dict is taken, since callbacks save step
        checkpoints earlier than that.

        Raises:
            NonFiniteLossError: on all ranks, if the loss of the step before was not finite on any.
        """
        if self._finished_step is None or self._finished_step == self.global_step:
            return
        self._guard.check(self._trainer)
        step, self._finished_step = self.global_step - 1, self.global_step
        if self._optimizer_stepped and self._rated_step != step:
            raise RuntimeError(
                f"{type(self).__name__} overrides optimizer_step, and this one did not set the step's learning rate and weight decay; call "
                "super().optimizer_step(...) in it. (set_rates is what to override for others)"
            )
        stepped, self._optimizer_stepped = self._optimizer_stepped, False
        non_finite = self._guard.total(self.device)
        self.after_step(step, stepped, non_finite)
        self._skipped_steps += not stepped
        self._guard.watch(non_finite, self._report(step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(_may_fuse(self.trainer))

    def configure_callbacks(self) -> list[Callback]:
        """Adds none; but it is the first hook of a run, and what is refused here leaves nothing behind, not even a logger's folder."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer(self.trainer, self.options["clip_grad"])
            check_sharded(self.trainer, self.options, self.trained)
        return []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_trainer(self.trainer, self.options["clip_grad"])
            check_sharded(self.trainer, self.options, self.trained)
            settle(self.trainer.strategy, (self.trained, self.evaluated))
            if self.options.get("compile"):
                self.compile()
            self._finds_batch_size = finds_batch_size(self.trainer)
            if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that the user chose
                self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
                if self.trainer.is_global_zero:
                    resume.sweep_partial_checkpoints(self.trainer)
            # A teacher is meant to be in evaluation mode.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def configure_model(self) -> None:
        """Distributes the networks where the strategy does (``training.sharding``)."""
        fits = is_sharded(self._trainer) and self._trainer.state.fn == TrainerFn.FITTING
        # In prediction ranks have different numbers of batches, and would wait for each other.
        if fits and not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            shard({self.trained, self.evaluated}, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        self.trainer.accumulate_grad_batches = resume.accumulated_batches(self.trainer)
        if self.trainer.callbacks or not self._finds_batch_size:  # no trial of a batch size, which is a few steps and saves nothing
            check_length(self.trainer, self.options)
            check_saving(self.trainer)
        warn_of_local_batch_norms(self.trainer, self.trained)
        warn_of_slow_precision(self.trainer)
        self.trained.train()  # whatever mode it came in: in evaluation mode it would have no drop path
        self.begin_run()
        if self._seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
            self._seed = self.trainer.strategy.broadcast(seed)
        warn_of_own_optimizers(self, is_own=getattr(self.configure_optimizers, "__func__", None) is not Method.configure_optimizers)
        resume.remember_saved_step(self.trainer)
        self._plan = self._layout = None
        self._finished_step, self._rated_step = self.global_step, -1
        self._optimizer_stepped = False
        self._skipped_steps = 0
        self._grad_norm = torch.zeros((), device=self.device)  # the last finite one
        self._guard = NonFiniteGuard()
        # A gradient scaler skips the optimizer's step without saying so; the optimizer itself knows whether it stepped.
        for optimizer in self.trainer.optimizers:
            optimizer.register_step_post_hook(self._note_step)

    def on_validation_start(self) -> None:
        self.finish_step()
        self._guard.check(self._trainer)

    def on_validation_end(self) -> None:
        if self.trainer.validating and not self.trainer.callback_metrics:
            rank_zero_info(
                "nothing was measured; dino_lightning.callbacks.OnlineKNN computes the k-NN accuracy, from two loaders: [bank, queries]"
            )

    def on_train_end(self) -> None:
        self.finish_step()
        self._guard.check(self._trainer)
        self._finished_step = self.observed = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.check(self._trainer)
        checkpoint["method"], checkpoint["started_from"] = self.method, self.started_from
        checkpoint["drop_path_seed"] = self._seed
        checkpoint["images"] = self.images
        facts = facts_of(self.evaluated.backbone)
        if facts:
            checkpoint["dino_lightning"] = facts
        layout = self._layout or self._resumed
        if layout is not None:
            checkpoint["layout"] = layout

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("method", "dino")
        if saved != self.method:
            named = METHODS.get(checkpoint.get("method", ""))  # none where on_save_checkpoint was overridden without super()
            use = f"dino_lightning.{named}" if named else "the class that trained it"
            raise ValueError(
                f"this checkpoint is of the method {saved!r}, {type(self).__name__} is {self.method!r}; use {use}, or load_backbone for the "
                "backbone alone"
            )
        self.started_from = checkpoint.get("started_from")
        self._seed = checkpoint.get("drop_path_seed")
        self.images = checkpoint.get("images", {})
        if self._trainer is not None:  # a run that goes on, not a module that is loaded
            self._resumed = checkpoint.get("layout")
            resume.mend_progress(checkpoint, self.trainer)
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
        return name if isinstance(name, str) and not is_object(name) else None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → the features to evaluate (B, D): of the teacher's backbone where there is one."""
        return self.evaluated.features(images)

    def as_backbone(self, trainable: bool = False) -> nn.Module:
        """A copy of the evaluated backbone for a network of your own, in evaluation mode: images (B, C, H, W) → (B, D).

        A ``VisionTransformer`` gives class and patch tokens of any blocks by ``forward_features``.

        Args:
            trainable: whether its parameters require gradients; call ``train()`` for stochastic depth.

        Raises:
            ValueError: if it is in shards (``strategy="sharded"``).
        """
        if any(isinstance(parameter, DTensor) for parameter in self.evaluated.backbone.parameters()):
            raise ValueError("this backbone is in shards over several devices; load_backbone(checkpoint) gives it whole")
        backbone = copy.deepcopy(self.evaluated.backbone).eval().requires_grad_(trainable)
        if getattr(backbone, "mask_token", None) is not None:
            backbone.mask_token.requires_grad_(False)  # it plays no part in features
        return backbone

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """(images, labels) of the bank (loader 0) or the queries (loader 1) → their features and labels, for callbacks."""
        images, labels = labelled_images(batch)
        return {"features": self(images), "labels": labels}

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Any]:
        """(images, paths) → (features (B, D), paths); of images alone, None for paths."""
        images, paths = images_and_rest(batch)
        return self(images), paths

    def _note_step(self, *_: Any) -> None:
        self._optimizer_stepped = True

    def _report(self, step: int) -> Callable[[], str]:
        """What to say of this step should its loss turn out not to be finite; reads from the device only then."""
        plan = self.plan

        def report() -> str:
            numbers = {
                **self.state_at(step),
                "learning rate": plan.lr_at(step),
                "last finite gradient norm": self._grad_norm.item(),
            }
            named = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            return f"the loss was not finite at step {step} (epoch {plan.epoch(step)}), with {named}"

        return report


def is_object(backbone: str) -> bool:
    """Whether it is no name, but says of which class the object was that a checkpoint does not hold."""
    return backbone.startswith(_OBJECT)


def plain(backbone: Any) -> Any:
    """How a backbone stands in the hyper-parameters, which hold plain types: names and class paths as they are, an object by its type."""
    if isinstance(backbone, nn.Module):
        return f"{_OBJECT}{type(backbone).__module__}.{type(backbone).__qualname__}"
    return backbone


def _may_fuse(trainer: Trainer) -> bool:
    """Whether the optimizer's step may be one kernel: not under a gradient scaler, which it would undo after the clipping, or on shards."""
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return not scaled and not is_sharded(trainer) and trainer.strategy.root_device.type in ("cpu", "cuda")


def _normalization(data: Any) -> dict[str, list[float]]:
    """Mean and standard deviation of the images of a data module, where it tells."""
    told = {name: getattr(data, name, None) for name in ("mean", "std")}
    return {name: [float(value) for value in values] for name, values in told.items() if isinstance(values, list | tuple)}


def _finish_before_saving(module: Method, *_: Any) -> None:
    """Callbacks save step checkpoints before the module's own hook runs."""
    module.finish_step()
