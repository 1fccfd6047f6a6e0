"""DINOModule: one training step of DINO (Caron et al. 2021, algorithm 1), told in the order in which it happens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dino_lightning.backbones.head import DINOHead
from dino_lightning.evaluation.flops import flops_per_image
from dino_lightning.losses.dino import DINOLoss
from dino_lightning.methods.base import Method, Observed, plain
from dino_lightning.methods.batch import split_views
from dino_lightning.methods.networks import Network, Teacher
from dino_lightning.training.optim import clip_each_
from dino_lightning.training.plan import MomentumPlan, Unsaid
from dino_lightning.training.randomness import seeded
from dino_lightning.training.schedules import linear_warmup
from dino_lightning.weights.load import start_from


@dataclass(frozen=True)
class DINOPlan(MomentumPlan):
    """Adds the teacher's temperature, constant within an epoch."""

    warmup_teacher_temp: float
    teacher_temp: float
    warmup_teacher_temp_epochs: int

    def teacher_temp_at(self, step: int) -> float:
        """The teacher's temperature; it rises linearly from epoch to epoch, as in the reference."""
        return linear_warmup(
            self.epoch(step),
            start_value=self.warmup_teacher_temp,
            final_value=self.teacher_temp,
            warmup_epochs=self.warmup_teacher_temp_epochs,
        )

    def values_at(self, step: int) -> dict[str, float]:
        return super().values_at(step) | {"teacher_temp": self.teacher_temp_at(step)}


class DINOModule(Method):
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
        compile: compile the backbones (torch.compile), which takes minutes at the start and makes the steps faster on a GPU.
        activation_checkpointing: of a ``VisionTransformer``, keep of each block its input alone and compute the rest anew in the backward
            pass: a fraction of the memory, a third more operations, the same numbers.
        weights: start from the trained backbone of this source instead of from noise, in student and teacher: a file, a
            folder or a published name, as ``load_backbone`` takes them. Its shape must be that of ``backbone``; positions are
            interpolated to ``img_size``. Checkpoints do not need the source any more.
        weights_with_head: take over the projection head and the centre of that source too.
    """

    method, title = "dino", "DINO"
    plan_type = DINOPlan

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
        compile: bool = False,
        activation_checkpointing: bool = False,
        weights: str | None = None,
        weights_with_head: bool = False,
    ) -> None:
        given, backbone = backbone, plain(backbone)  # a checkpoint holds plain types only
        super().__init__(locals())
        given = self.build_backbone(given)
        head = DINOHead(
            self._width,
            out_dim,
            use_bn=use_bn_in_head,
            norm_last_layer=norm_last_layer,
            nlayers=head_layers,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
        )
        self.loss = DINOLoss(out_dim, student_temp, center_momentum)
        if weights_with_head and weights is None:
            raise ValueError("weights_with_head takes the head of weights, and there are none: give weights=SOURCE, or leave it out")
        if weights is not None:
            start_from(weights, given, head if weights_with_head else None, self.loss.center)
        self.student = Network(given, head)
        self.teacher = Teacher(self.student)

    @property
    def trained(self) -> Network:
        return self.student

    @property
    def evaluated(self) -> Network:
        return self.teacher

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One (micro-)batch → the loss, and for callbacks the teacher's entropy and the KL divergence, detached, in nats."""
        views = split_views(batch)
        teacher_temp = self.plan.teacher_temp_at(self.global_step)
        with torch.no_grad():
            features = self.teacher.embed(views[:2])  # (2·B, D)
            teacher_logits = self.teacher.head(features)  # (2·B, K)
        with seeded(self.device, *self.key):  # for the drop path
            student_logits = self.student(views)  # (V·B, K)
        loss = self.loss(student_logits, teacher_logits, teacher_temp)
        self.observed = Observed(features, teacher_logits, self.loss.center)
        entropy = cast(Tensor, self.loss.teacher_entropy)  # known after a call
        kl = loss.detach() - entropy
        numbers = {"loss": loss.detach(), "teacher_entropy": entropy, "kl": kl, "center_norm": self.loss.center.norm()}
        self.report(numbers)
        return {"loss": loss, "teacher_entropy": entropy, "kl": kl}

    def flops_per_image(self, views: Sequence[Tensor]) -> int:
        return flops_per_image(self.student, self.teacher, views)

    def frozen_parts(self, step: int) -> Iterable[nn.Module]:
        return [cast(DINOHead, self.student.head).last_layer] if self.plan.epoch(step) < self.options["freeze_last_layer"] else []

    def clip(self, gradients: list[Tensor], norms: list[Tensor], max_norm: float) -> None:
        """Each gradient by its own norm."""
        clip_each_(gradients, norms, max_norm)

    def after_step(self, step: int, stepped: bool, non_finite: Tensor) -> None:
        """The teacher and the centre follow (section 3.1)."""
        self.loss.update_center(skip=not stepped)  # which counts losses that are not finite by itself
        if stepped:
            self.teacher.follow(self.student, self.plan.momentum_at(step))

    def begin_run(self) -> None:
        self.loss.train()
        self.loss.reset()

    def state_at(self, step: int) -> dict[str, float]:
        return {"teacher temperature": self.plan.teacher_temp_at(step), "norm of the centre": self.loss.center.norm().item()}
