"""DINOv2Module: DINO's loss on class tokens, iBOT's on masked patches and KoLeo (Oquab et al. 2023, section 4), step by step."""

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer
from dino_lightning.backbones.head import DINOHead
from dino_lightning.backbones.vit import patch_grid
from dino_lightning.data.masking import sample_masks
from dino_lightning.evaluation.flops import count_flops
from dino_lightning.losses import Centering, IBOTLoss, KoLeoLoss, dino_terms, sinkhorn_knopp
from dino_lightning.methods.base import Method, Observed, is_object, plain
from dino_lightning.methods.batch import split_views
from dino_lightning.methods.networks import Network, Teacher
from dino_lightning.training.late import sent
from dino_lightning.training.optim import Layered, build_optimizer, clip_together_, layered_param_groups
from dino_lightning.training.plan import MomentumPlan, Unsaid
from dino_lightning.training.randomness import generator, seeded
from dino_lightning.training.schedules import linear_warmup
from dino_lightning.weights.load import start_from

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DINOv2Plan(MomentumPlan):
    """The reference's schedules, with the teacher's temperature, all step by step. After the last step they keep their last value."""

    warmup_teacher_temp: float
    teacher_temp: float
    warmup_teacher_temp_epochs: float
    freeze_last_layer: int

    def last_layer_lr_at(self, step: int) -> float:
        """The learning rate of the heads' last layers, 0 in the first epochs."""
        return 0.0 if step < self.steps(self.freeze_last_layer) else self.lr_at(step)

    def teacher_temp_at(self, step: int) -> float:
        """The teacher's temperature; it rises linearly from step to step."""
        warmup_steps = self.steps(self.warmup_teacher_temp_epochs)
        return linear_warmup(step, start_value=self.warmup_teacher_temp, final_value=self.teacher_temp, warmup_epochs=warmup_steps)

    def values_at(self, step: int) -> dict[str, float]:
        own = {"last_layer_lr": self.last_layer_lr_at, "teacher_temp": self.teacher_temp_at}
        return super().values_at(step) | {name: value_at(step) for name, value_at in own.items()}


class DINOv2Module(Method):
    """Self-distillation of class tokens and of masked patches: the student sees the global crops with patches masked, and learns
    what the teacher says of the whole crops, of the image and of each masked patch.

    Trains on batches of views as ``DINOModule`` does. The options and defaults are those of the reference's default configuration,
    a ViT-L for 1.3 million images; for less there are recipes, ``--config dinov2_small_images``.

    ``key`` is (seed, step, micro-batch, rank) of the training step under way: what is drawn in it depends on that alone.

    Args:
        backbone: vit_tiny, vit_small, vit_base, vit_large or vit_giant; dinov2_vits14, b, l and g, with _reg for registers, which
            bring their own patch size, registers and LayerScale; or a ``VisionTransformer(..., mask_token=True)``. Without iBOT
            (``ibot_loss_weight=0``) any backbone of ``DINOModule``.
        patch_size: pixels of a patch's side.
        img_size: pixels, int or (H, W): the size whose grid the positions have. Set it to the global crop size.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of every block of the student: this share of the images goes past each branch.
        registers: tokens beside the class token and the patches.
        layer_scale: gain of each block's branches at the start; null for none. Small networks in short runs want more, or none.
        ffn: the blocks' MLP, with GELU, or gated by SiLU ("swiglu").
        out_dim: number of prototypes K. Fewer suit small data sets.
        hidden_dim: width of the head's MLP.
        bottleneck_dim: width of the head's L2-normalised bottleneck.
        head_layers: layers of the head's MLP.
        norm_last_layer: keep the prototypes at unit norm; the reference learns and decays their gains.
        ibot_separate_head: a head of its own for the patches, of the three sizes that follow.
        ibot_out_dim: number of its prototypes.
        ibot_hidden_dim: width of its MLP.
        ibot_bottleneck_dim: width of its bottleneck.
        dino_loss_weight: of the class tokens' loss.
        ibot_loss_weight: of the patches' loss; at 0 there is none.
        koleo_loss_weight: of KoLeo, which spreads the class tokens of a batch; it sees the device's micro-batch only.
        centering: of the teacher's logits: "centering", by a running mean, or "sinkhorn_knopp", by the batch over all devices.
        mask_ratio: smallest and largest share of masked patches of a masked crop.
        mask_probability: share of the global crops that are masked.
        momentum_teacher: of the moving average at the start; a cosine brings it to 1.
        warmup_teacher_temp: temperature of the teacher's softmax at the first step.
        teacher_temp: temperature of the teacher's softmax after its warm-up.
        warmup_teacher_temp_epochs: epochs of the linear warm-up of the temperature, step by step; the default becomes a tenth of a
            run that is shorter than twice that.
        student_temp: temperature of the student's softmax.
        center_momentum: of the moving average of the teacher's logits, with centering.
        optimizer: adamw, sgd (momentum 0.9) or lars.
        lr: learning rate after its warm-up, for 1,024 images a step: it is scaled by the square root of the real number
            (batch size × devices × accumulated batches).
        min_lr: learning rate at the end, not scaled.
        warmup_epochs: epochs of the linear warm-up of the learning rate; the default becomes a tenth of a short run, likewise.
        layerwise_decay: each block's learning rate is that of the block above times this.
        patch_embed_lr_mult: factor on the learning rate of the patch embedding.
        weight_decay: weight decay at the start; not on biases, norms and LayerScale.
        weight_decay_end: weight decay at the end of its cosine.
        clip_grad: largest L2 norm of the gradient of the backbone and of each head; 0 is off.
        freeze_last_layer: epochs at the start in which the prototypes stay as they are: their learning rate is 0.
        freeze_backbone_epochs: epochs at the start in which the backbone stays as it is and the heads learn: for a run that starts
            from ``weights``, whose features untrained heads would ruin.
        compile: compile the backbones (torch.compile), which takes minutes at the start and makes the steps faster on a GPU.
        activation_checkpointing: of a ``VisionTransformer``, keep of each block its input alone and compute the rest anew in the backward
            pass: a fraction of the memory, a third more operations, the same numbers.
        weights: start from the trained backbone of this source, in student and teacher, as ``DINOModule`` does; heads are new, since
            none were published.
    """

    method, title = "dinov2", "DINOv2"
    plan_type = DINOv2Plan

    def __init__(
        self,
        backbone: str | nn.Module = "vit_large",
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.3,
        registers: int = 0,
        layer_scale: float | None = 1e-5,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        norm_last_layer: bool = False,
        ibot_separate_head: bool = False,
        ibot_out_dim: int = 65536,
        ibot_hidden_dim: int = 2048,
        ibot_bottleneck_dim: int = 256,
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        koleo_loss_weight: float = 0.1,
        centering: Literal["centering", "sinkhorn_knopp"] = "centering",
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        momentum_teacher: float = 0.992,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.07,
        warmup_teacher_temp_epochs: int = Unsaid(30),
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        lr: float = 4e-3,
        min_lr: float = 1e-6,
        warmup_epochs: int = Unsaid(10),
        layerwise_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
        weight_decay: float = 0.04,
        weight_decay_end: float = 0.4,
        clip_grad: float = 3.0,
        freeze_last_layer: int = 1,
        freeze_backbone_epochs: int = 0,
        compile: bool = False,
        activation_checkpointing: bool = False,
        weights: str | None = None,
    ) -> None:
        given, backbone = backbone, plain(backbone)  # a checkpoint holds plain types only
        super().__init__(locals())
        if dino_loss_weight == ibot_loss_weight == koleo_loss_weight == 0:
            raise ValueError("dino_loss_weight, ibot_loss_weight and koleo_loss_weight are all 0: there is nothing to learn")
        given = self._build(given)
        heads = {"dino_head": (out_dim, hidden_dim, bottleneck_dim)}
        if ibot_separate_head and ibot_loss_weight > 0:
            heads["ibot_head"] = (ibot_out_dim, ibot_hidden_dim, ibot_bottleneck_dim)
        if weights is not None:
            start_from(weights, given)
            if freeze_backbone_epochs == 0:
                log.warning("the heads are new and the backbone is trained: freeze_backbone_epochs=1 trains them first, and keeps it")
        shape = {"norm_last_layer": norm_last_layer, "nlayers": head_layers}
        built = {
            name: DINOHead(self._width, k, hidden_dim=wide, bottleneck_dim=narrow, **shape) for name, (k, wide, narrow) in heads.items()
        }
        self.student = Network(given, **built)
        self.teacher = Teacher(self.student)
        self.koleo_loss, self.ibot_loss = KoLeoLoss(), IBOTLoss(student_temp)
        if centering == "centering":
            self.dino_center = Centering(out_dim, center_momentum)
            if ibot_loss_weight > 0:
                self.ibot_center = Centering(ibot_out_dim if ibot_separate_head else out_dim, center_momentum)

    def _build(self, given: str | nn.Module) -> nn.Module:
        """The backbone, with a mask token where patches are masked."""
        options, masks = self.options, self.options["ibot_loss_weight"] > 0
        more: dict[str, Any] = {}
        if isinstance(given, str) and given.startswith(("vit_", "dinov2_")):
            more = {"mask_token": True, "drop_path_uniform": True}
        shape = {name: options[name] for name in _SHAPE}
        defaults = inspect.signature(DINOv2Module.__init__).parameters
        if isinstance(given, str) and given.startswith("vit_"):
            more |= shape
        elif isinstance(given, str) and not is_object(given) and any(value != defaults[name].default for name, value in shape.items()):
            raise ValueError(f"{', '.join(_SHAPE)} shape the backbones vit_*; {given} brings its own, so leave them out (got {shape})")
        backbone = self.build_backbone(given, used=["mask_token"], **more)
        maskable = isinstance(backbone, VisionTransformer) and backbone.mask_token is not None
        if masks and not maskable:
            raise ValueError(
                f"ibot_loss_weight={options['ibot_loss_weight']} needs patches that can be masked, which {type(backbone).__name__} has not: "
                "give a VisionTransformer(..., mask_token=True) or the name of a ViT (with weights=... for trained ones), or set "
                "ibot_loss_weight=0"
            )
        if maskable:
            backbone.mask_token.requires_grad_(True)  # frozen where only features are taken
        return backbone

    @property
    def trained(self) -> Network:
        return self.student

    @property
    def evaluated(self) -> Network:
        return self.teacher

    def draw_masks(self, n_crops: int, grid: tuple[int, int]) -> Tensor:
        """Which patches of the global crops the student does not see: bool (2·B, h·w), all of global view 0 first.

        Drawn on the host by ``self.key``. Override it for masks of your own.

        Args:
            n_crops: 2·B.
            grid: (h, w) patches of a crop.
        """
        options, random = self.options, generator(*self.key, 1)
        masks = sample_masks(n_crops, grid, ratio=options["mask_ratio"], probability=options["mask_probability"], generator=random)
        return masks.flatten(1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One (micro-)batch → the loss, and for callbacks what its parts are, detached, in nats."""
        views, options = split_views(batch), self.options
        if views[0].shape != views[1].shape:
            raise ValueError(f"the two global crops must have one size, got {tuple(views[0].shape)} and {tuple(views[1].shape)}")
        temp = self.plan.teacher_temp_at(self.global_step)
        masks, rows = self._masked(views[0])
        with torch.no_grad():
            features, logits, patch_logits = _look(self.teacher, views[:2], rows)
            targets = self._targets("dino", logits, temp)  # (2·B, K)
            patch_targets = self._targets("ibot", patch_logits, temp)  # (M, K)
            del logits, patch_logits
        with seeded(self.device, *self.key):  # for the drop path
            student = _look(self.student, views, rows, masks)

        dino_global, dino_local = dino_terms(student.logits, targets, options["student_temp"])
        dino_loss = dino_global + dino_local
        loss = options["dino_loss_weight"] * dino_loss
        parts = {"dino_global_loss": dino_global, "dino_local_loss": dino_local}
        if rows is not None:
            parts["ibot_loss"] = self.ibot_loss(student.patch_logits, patch_targets, masks)
            loss = loss + options["ibot_loss_weight"] * parts["ibot_loss"]
        if options["koleo_loss_weight"] > 0:
            parts["koleo_loss"], parts["koleo_distance"] = self._koleo(student.features)
            loss = loss + options["koleo_loss_weight"] * parts["koleo_loss"]

        self.observed = Observed(features, targets)
        numbers = {"loss": loss, **parts, **self._measure(targets, patch_targets, masks, dino_loss)}
        numbers = {name: value.detach() for name, value in numbers.items()}
        self.report(numbers)
        return {**numbers, "loss": loss}

    def clip(self, gradients: list[Tensor], norms: list[Tensor], max_norm: float) -> None:
        """The backbone and each head by its own norm."""
        start = 0
        for name, part in self.student.named_children():
            stop = start + sum(parameter.grad is not None for parameter in part.parameters())
            if stop > start:
                self.report({f"grad_norm_{name}": clip_together_(gradients[start:stop], norms[start:stop], max_norm)})
            start = stop

    def after_step(self, step: int, stepped: bool, non_finite: Tensor) -> None:
        """The teacher and the centres follow."""
        for center in self._centers().values():
            if stepped:
                center.update_center(keep=non_finite > 0)
            else:
                center.reset()
        if stepped:
            self.teacher.follow(self.student, self.plan.momentum_at(step))

    def begin_run(self) -> None:
        for center in self._centers().values():
            center.train()
            center.reset()

    def frozen_parts(self, step: int) -> list[nn.Module]:
        return [self.student.backbone] if self.plan.epoch(step) < self.options["freeze_backbone_epochs"] else []

    def learning_rate(self, images: int) -> float:
        return self.options["lr"] * math.sqrt(images / 1024)

    def build_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        backbone = self.student.backbone
        depth = len(backbone.blocks) if isinstance(backbone, VisionTransformer) else None
        return build_optimizer(self.options["optimizer"], layered_param_groups(self.student, depth), fused=fused)

    def set_rates(self, groups: list[dict[str, Any]], step: int) -> None:
        """A frozen last layer has a rate of 0: its moments move, and its gradient counts in the norm that is clipped.

        A backbone that was held has a warm-up of its own from then on: its moments are empty, and its features are to be kept.
        """
        plan, options = self.plan, self.options
        held, warmup = plan.steps(options["freeze_backbone_epochs"]), plan.steps(plan.warmup_epochs)
        ramp = linear_warmup(max(0, step - held), start_value=0.0, final_value=1.0, warmup_epochs=warmup) if held else 1.0
        for group in groups:
            place = Layered(*(group[name] for name in Layered._fields))
            rate = plan.last_layer_lr_at(step) if place.last_layer else plan.lr_at(step)
            rate *= place.lr_multiplier(options["layerwise_decay"], options["patch_embed_lr_mult"])
            group["lr"] = rate * ramp if place.backbone else rate
            group["weight_decay"] = plan.weight_decay_at(step) if place.decayed else 0.0

    def flops_per_image(self, views: Sequence[Tensor]) -> int:
        """With as many masked patches as the options say on average."""
        rows = None
        if self.options["ibot_loss_weight"] > 0:
            patches = math.prod(patch_grid(*views[0].shape[-2:], self.student.backbone.patch_size))
            masked = 2 * patches * self.options["mask_probability"] * sum(self.options["mask_ratio"]) / 2
            rows = torch.arange(round(masked), device=self.device)
        student = count_flops(self.student, lambda: _look(self.student, views, rows))
        return 3 * student + count_flops(self.teacher, lambda: _look(self.teacher, views[:2], rows))

    def state_at(self, step: int) -> dict[str, float]:
        norms = {f"norm of {name}": center.center.norm().item() for name, center in self._centers().items()}
        return {"teacher temperature": self.plan.teacher_temp_at(step), **norms}

    def _centers(self) -> dict[str, Centering]:
        return {name: part for name, part in self.named_children() if isinstance(part, Centering)}

    def _targets(self, which: Literal["dino", "ibot"], logits: Tensor | None, temp: float) -> Tensor | None:
        """The teacher's distributions; a centre is as it was before this step."""
        if logits is None or self.options["centering"] == "sinkhorn_knopp":
            return None if logits is None else sinkhorn_knopp(logits, temp)
        return getattr(self, f"{which}_center")(logits, temp)

    def _masked(self, view: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The masks (2·B, h·w), and the places (M,) of masked patches among all if iBOT needs them, on the device."""
        backbone = self.student.backbone
        if getattr(backbone, "mask_token", None) is None:
            return None, None
        masks = self.draw_masks(2 * len(view), patch_grid(*view.shape[-2:], backbone.patch_size))
        rows = masks.flatten().nonzero().squeeze(1) if self.options["ibot_loss_weight"] > 0 else None
        return sent(masks, view.device), rows if rows is None else sent(rows, view.device)

    @torch.no_grad()
    def _measure(self, targets: Tensor, patch_targets: Tensor | None, masks: Tensor | None, dino_loss: Tensor) -> dict[str, Tensor]:
        """What tells how the run fares, for the log and the doctor."""
        entropy = _entropy(targets)
        numbers = {"teacher_entropy": entropy, "kl": dino_loss - entropy}
        if patch_targets is not None:
            numbers["masked"] = entropy.new_full((), len(patch_targets) / masks.numel())
        if patch_targets is not None and len(patch_targets):
            some = patch_targets[:_MEASURED]
            chosen = torch.zeros_like(some[0]).index_add_(0, some.argmax(dim=1), torch.full_like(some[:, 0], 1 / len(some)))
            numbers |= {"patch_entropy": _entropy(some), "patch_prototypes": _entropy(chosen[None]).exp()}
        norms = {"dino_center": "center_norm", "ibot_center": "patch_center_norm"}
        return numbers | {norms[name]: center.center.norm() for name, center in self._centers().items()}

    def _koleo(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """KoLeo of both global views of the student (2·B, D), added up, and the mean distance to the nearest neighbour, else NaN."""
        losses, distances = [], []
        for view in features.chunk(2):
            losses.append(self.koleo_loss(view))
            distances.append(self.koleo_loss.distance)
        distance = losses[0].new_full((), math.nan) if None in distances else torch.stack(distances).mean()
        return torch.stack(losses).sum(), distance


_SHAPE = ("registers", "layer_scale", "ffn")  # options that shape the backbones vit_*
_MEASURED = 256  # masked patches that the entropy is taken of: all would be one more pass over the widest tensor


class _Look(NamedTuple):
    """``features`` (2·B, D) of the global crops, ``logits`` (V·B, K) of all views, ``patch_logits`` (M, K) of the masked patches."""

    features: Tensor
    logits: Tensor
    patch_logits: Tensor | None


def _look(network: Network, views: Sequence[Tensor], rows: Tensor | None, masks: Tensor | None = None) -> _Look:
    """What a network makes of the views: of the global crops with their ``masks``, where it is to be given any."""
    crops, local = torch.cat(list(views[:2])), views[2:]
    if rows is None and masks is None:
        features, patches = network.backbone(crops), None
    else:
        tokens = network.backbone.forward_features(crops, masks=masks)[0]
        features, patches = tokens.cls, tokens.patches.flatten(2).transpose(1, 2).flatten(0, 1)  # (2·B·h·w, D)
    logits = network.dino_head(torch.cat([features, network.embed(local)]) if local else features)
    # Not together with the class tokens: joining and parting the widest tensors costs more than a second call of the head.
    patch_logits = None if rows is None else getattr(network, "ibot_head", network.dino_head)(patches.index_select(0, rows))
    return _Look(features, logits, patch_logits)


def _entropy(p: Tensor) -> Tensor:
    """Mean entropy of distributions (n, K), in nats."""
    return torch.special.entr(p).sum(dim=-1).mean()
