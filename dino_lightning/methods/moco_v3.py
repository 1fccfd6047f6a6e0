"""MoCoV3Module: queries of a student and keys of its moving average, of one batch (Chen et al. 2021), step by step."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer
from dino_lightning.backbones.projector import projector
from dino_lightning.evaluation.flops import flops_per_image
from dino_lightning.losses import InfoNCELoss
from dino_lightning.methods.base import Method, Observed, plain
from dino_lightning.methods.batch import global_views
from dino_lightning.methods.networks import Network, Teacher
from dino_lightning.training.plan import MomentumPlan, Unsaid
from dino_lightning.training.randomness import seeded
from dino_lightning.weights.load import start_from


class MoCoV3Module(Method):
    """Contrastive learning with a moving average: a query from one view should find the key of the other among all keys of the batch.

    Trains on the two global views (any batch of ``DINOModule``; local ones are left out); keys of all devices are negatives, and
    accumulated batches do not count as one. Defaults are the paper's for a ViT (sections 4 and 5), except
    that positions are learned, not fixed, and that ViT-S has 6 heads, not 12.
    ``MultiCropDataModule(root, **MoCoV3Module.data)`` cuts views as the paper does.

    Args:
        backbone: any backbone of ``DINOModule``: a name, or a module that maps images (B, C, H, W) to features (B, D).
        patch_size: pixels of a ViT patch's side.
        img_size: pixels, int or (H, W): the size whose grid a ViT's positions have. Set it to the global crop size.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of a ViT.
        head_layers: layers of the projector; the predictor has two.
        hidden_dim: width of the hidden layers of projector and predictor.
        projection_dim: width of queries and keys.
        temperature: of the softmax over cosines.
        momentum_teacher: of the moving average at the start; a cosine brings it to 1.
        freeze_patch_embed: keep a ViT's patch embedding as it came, which makes training stable.
        optimizer: adamw, sgd (momentum 0.9) or lars.
        lr: learning rate after its warm-up, for 256 images a step: it is scaled by the real number
            (batch size × devices × accumulated batches).
        min_lr: learning rate at the end, not scaled.
        warmup_epochs: epochs of the linear warm-up of the learning rate; the default becomes a tenth of a run
            that is shorter than twice that.
        weight_decay: weight decay at the start; not on biases and norms.
        weight_decay_end: weight decay at the end of its cosine.
        clip_grad: largest L2 norm of the gradient of all parameters together; 0 is off.
        compile: compile the backbone (torch.compile), which takes minutes at the start and makes the steps faster on a GPU.
        weights: start from the trained backbone of this source instead of from noise, as ``DINOModule`` does.

    Attributes:
        student: backbone, projector (``head``) and ``predictor``.
        teacher: backbone and projector.
        data: options of ``MultiCropDataModule``, as the paper has them.
    """

    method, title = "moco_v3", "MoCo v3"
    plan_type = MomentumPlan
    data: ClassVar[dict[str, Any]] = {"global_crops_scale": (0.08, 1.0), "local_crops_number": 0}

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small",
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        head_layers: int = 3,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        temperature: float = 0.2,
        momentum_teacher: float = 0.99,
        freeze_patch_embed: bool = True,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        lr: float = 1.5e-4,
        min_lr: float = 0.0,
        warmup_epochs: int = Unsaid(40),
        weight_decay: float = 0.1,
        weight_decay_end: float = 0.1,
        clip_grad: float = 0.0,
        compile: bool = False,
        weights: str | None = None,
    ) -> None:
        given, backbone = backbone, plain(backbone)  # a checkpoint holds plain types only
        super().__init__(locals())
        given = self.build_backbone(given)
        if weights is not None:
            start_from(weights, given)
        if freeze_patch_embed and isinstance(given, VisionTransformer):
            given.patch_embed.requires_grad_(False)
        head = projector(self._width, hidden_dim, projection_dim, head_layers, last_norm="plain")
        predictor = projector(projection_dim, hidden_dim, projection_dim, last_norm="plain")
        self.student = Network(given, head, predictor=predictor)
        self.teacher = Teacher(self.student, without=["predictor"])
        self.loss = InfoNCELoss(temperature)

    @property
    def trained(self) -> Network:
        return self.student

    @property
    def evaluated(self) -> Network:
        return self.teacher

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One (micro-)batch → the loss: the sum over both directions, each 2·temperature times nats."""
        views = global_views(batch)
        with torch.no_grad():
            features = self.teacher.embed(views)  # (2·B, D)
            first, second = self.teacher.head(features).chunk(2)
        with seeded(self.device, *self.key):  # for the drop path
            from_first, from_second = self.student.predictor(self.student(views)).chunk(2)
        loss = self.loss(from_first, second) + self.loss(from_second, first)
        self.observed = Observed(features)
        self.report({"loss": loss.detach()})
        return {"loss": loss}

    def after_step(self, step: int, stepped: bool, non_finite: Tensor) -> None:
        """The teacher follows."""
        if stepped:
            self.teacher.follow(self.student, self.plan.momentum_at(step))

    def flops_per_image(self, views: Sequence[Tensor]) -> int:
        return flops_per_image(self.student, self.teacher, views[:2])
