"""SimCLRModule: contrasts two views of an image with all other views of the batch (Chen et al. 2020), step by step."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from dino_lightning.backbones.projector import projector
from dino_lightning.losses import NTXentLoss
from dino_lightning.methods.base import Method, Observed, plain
from dino_lightning.methods.batch import global_views
from dino_lightning.methods.networks import Network
from dino_lightning.training.plan import Unsaid
from dino_lightning.training.randomness import seeded
from dino_lightning.weights.load import start_from


class SimCLRModule(Method):
    """Contrastive learning: of all projections in the batch, that of an image's other view should be the nearest.

    Trains on the two global views (any batch of ``DINOModule``; local ones are left out). All views of all devices are each other's
    negatives, so large batches help, and accumulated ones do not count as one. Defaults are the paper's for a ResNet-50 (sections 2
    and 4). ``MultiCropDataModule(root, **SimCLRModule.data)`` cuts views as the paper does.

    Args:
        backbone: any backbone of ``DINOModule``: a name, or a module that maps images (B, C, H, W) to features (B, D).
        patch_size: pixels of a ViT patch's side.
        img_size: pixels, int or (H, W): the size whose grid a ViT's positions have. Set it to the global crop size.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of a ViT.
        hidden_dim: width of the projector's hidden layer.
        projection_dim: width of the projections.
        temperature: of the softmax over cosines.
        optimizer: lars (for large batches), sgd (momentum 0.9) or adamw.
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
        network: backbone and projector (``head``).
        data: options of ``MultiCropDataModule``, as the paper has them.
    """

    method, title = "simclr", "SimCLR"
    data: ClassVar[dict[str, Any]] = {
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 0,
        "color_jitter": (0.8, 0.8, 0.8, 0.2),
        "blur_p": (0.5, 0.5, 0.5),
        "solarize_p": 0.0,
    }

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        temperature: float = 0.1,
        optimizer: Literal["adamw", "sgd", "lars"] = "lars",
        lr: float = 0.3,
        min_lr: float = 0.0,
        warmup_epochs: int = Unsaid(10),
        weight_decay: float = 1e-6,
        weight_decay_end: float = 1e-6,
        clip_grad: float = 0.0,
        compile: bool = False,
        weights: str | None = None,
    ) -> None:
        given, backbone = backbone, plain(backbone)  # a checkpoint holds plain types only
        super().__init__(locals())
        given = self.build_backbone(given)
        if weights is not None:
            start_from(weights, given)
        self.network = Network(given, projector(self._width, hidden_dim, projection_dim, last_norm="affine"))
        self.loss = NTXentLoss(temperature)

    @property
    def trained(self) -> Network:
        return self.network

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One batch → the loss, in nats."""
        with seeded(self.device, *self.key):  # for the drop path
            features = self.network.embed(global_views(batch))  # (2·B, D)
            first, second = self.network.head(features).chunk(2)
        loss = self.loss(first, second)
        self.observed = Observed(features.detach())
        self.report({"loss": loss.detach()})
        return {"loss": loss}

    def flops_per_image(self, views: Sequence[Tensor]) -> int:
        return super().flops_per_image(views[:2])
