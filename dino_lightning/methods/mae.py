"""MAEModule: most patches are hidden, and their pixels are predicted from the rest (He et al. 2022), step by step."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer
from dino_lightning.backbones.pixel_decoder import PixelDecoder
from dino_lightning.backbones.positions import sincos_positions
from dino_lightning.evaluation.flops import count_flops
from dino_lightning.losses import MaskedPixelsLoss
from dino_lightning.methods.base import Method, Observed, plain
from dino_lightning.methods.batch import global_views
from dino_lightning.methods.networks import Network
from dino_lightning.training.late import sent
from dino_lightning.training.plan import Unsaid
from dino_lightning.training.randomness import generator, seeded
from dino_lightning.weights.load import start_from


class MAEModule(Method):
    """Masked autoencoding: a ViT sees a quarter of the patches, a small decoder draws the others.

    Trains on global views (any batch of ``DINOModule``; local ones are left out); there is no second view of an image, so its two
    crops are two samples. Positions are fixed. Defaults are the paper's (section 4, appendix A.1).
    ``MultiCropDataModule(root, **MAEModule.data)`` crops and flips, as the paper does. Its features are poor neighbours before they
    are trained on (fine-tuned), by nature.

    Args:
        backbone: vit_tiny, vit_small, vit_base, vit_large or vit_giant, or a ``VisionTransformer``, whose positions are replaced by fixed ones
            unless ``weights`` are given.
        patch_size: pixels of a patch's side.
        img_size: pixels, int or (H, W): the size of the global crops.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth of the encoder.
        masking_ratio: share of the patches that are hidden.
        normalize_pixels: compare pixels within each patch at mean 0 and variance 1.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder; must divide its width.
        optimizer: adamw, sgd (momentum 0.9) or lars.
        lr: learning rate after its warm-up, for 256 images a step: it is scaled by the real number
            (batch size × devices × accumulated batches).
        betas: of AdamW.
        min_lr: learning rate at the end, not scaled.
        warmup_epochs: epochs of the linear warm-up of the learning rate; the default becomes a tenth of a run
            that is shorter than twice that.
        weight_decay: weight decay at the start; not on biases and norms.
        weight_decay_end: weight decay at the end of its cosine.
        clip_grad: largest L2 norm of the gradient of all parameters together; 0 is off.
        compile: compile the backbone (torch.compile), which takes minutes at the start and makes the steps faster on a GPU.
        weights: start from the trained backbone of this source instead of from noise, as ``DINOModule`` does.

    Attributes:
        network: the ViT and its decoder (``head``).
        data: options of ``MultiCropDataModule``, as the paper has them.
    """

    method, title = "mae", "MAE"
    data: ClassVar[dict[str, Any]] = {
        "global_crops_scale": (0.2, 1.0),
        "local_crops_number": 0,
        "jitter_p": 0.0,
        "grayscale_p": 0.0,
        "blur_p": (0.0, 0.0, 0.0),
        "solarize_p": 0.0,
    }

    def __init__(
        self,
        backbone: str | nn.Module = "vit_base",
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        masking_ratio: float = 0.75,
        normalize_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        optimizer: Literal["adamw", "sgd", "lars"] = "adamw",
        lr: float = 1.5e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        min_lr: float = 0.0,
        warmup_epochs: int = Unsaid(40),
        weight_decay: float = 0.05,
        weight_decay_end: float = 0.05,
        clip_grad: float = 0.0,
        compile: bool = False,
        weights: str | None = None,
    ) -> None:
        given, backbone = backbone, plain(backbone)  # a checkpoint holds plain types only
        super().__init__(locals())
        vit = self.build_backbone(given)
        if not isinstance(vit, VisionTransformer):
            raise ValueError(f"MAE hides patches, which {type(vit).__name__} has not: give the name of a ViT or a VisionTransformer")
        patches = vit.grid[0] * vit.grid[1]
        if not 1 <= self._hidden(patches) < patches:
            raise ValueError(
                f"masking_ratio={masking_ratio} hides {self._hidden(patches)} of {patches} patches; some must be hidden, and some seen"
            )
        if weights is not None:
            start_from(weights, vit)
        else:
            with torch.no_grad():
                vit.pos_embed.copy_(sincos_positions(vit.grid, vit.embed_dim))
        vit.pos_embed.requires_grad_(False)
        pixels = vit.patch_embed.proj.in_channels * vit.patch_size**2
        self.network = Network(vit, PixelDecoder(vit.embed_dim, pixels, vit.grid, decoder_dim, decoder_depth, decoder_heads))
        self.loss = MaskedPixelsLoss(normalize_pixels)

    @property
    def trained(self) -> Network:
        return self.network

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One (micro-)batch → the loss, a mean squared error."""
        images = torch.cat(global_views(batch))  # (2·B, C, H, W)
        vit, decoder = self.network.backbone, self.network.head
        patches = vit.grid[0] * vit.grid[1]
        if images.shape[-2:] != (vit.grid[0] * vit.patch_size, vit.grid[1] * vit.patch_size):
            raise ValueError(
                f"MAE's decoder is laid out for {vit.grid[0]}×{vit.grid[1]} patches; set img_size to the crops' {tuple(images.shape[-2:])}"
            )
        order = generator(*self.key, 1).random((len(images), patches)).argsort(axis=1)
        order = sent(torch.from_numpy(order), images.device)  # (2·B, N)
        kept = order[:, self._hidden(patches) :]
        with seeded(self.device, *self.key):  # for the drop path
            tokens = vit.forward_kept(images, kept)  # (2·B, 1 + R + n, D)
        masks = torch.ones_like(order, dtype=torch.bool).scatter(1, kept, False)
        loss = self.loss(decoder(tokens, kept), images, masks)
        self.observed = Observed(tokens[:, 0].detach())
        self.report({"loss": loss.detach()})
        return {"loss": loss}

    def build_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(fused)
        if isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:
                group["betas"] = self.options["betas"]
        return optimizer

    def flops_per_image(self, views: Sequence[Tensor]) -> int:
        """Of both crops."""
        network, images = self.network, torch.cat(views[:2])
        patches = network.backbone.grid[0] * network.backbone.grid[1]
        kept = torch.arange(patches - self._hidden(patches), device=images.device).expand(len(images), -1)
        return 3 * count_flops(network, lambda: network.head(network.backbone.forward_kept(images, kept), kept))

    def _hidden(self, patches: int) -> int:
        """How many patches of an image are hidden."""
        return patches - int(patches * (1 - self.options["masking_ratio"]))
