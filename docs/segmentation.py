"""A network of your own on a trained backbone: it segments the quickstart's scenes.  python docs/segmentation.py CHECKPOINT

The backbone stays as it is. A convolution of one pixel on the patch tokens of its last two blocks learns from 64 scenes with masks
where the object is; scenes that it never saw tell how well.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dino_lightning import DINOModule
from dino_lightning.data import Scenes
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, normalize


class Segmenter(LightningModule):
    """Images (B, 3, H, W) → logits of the object (B, 1, H, W)."""

    def __init__(self, backbone: nn.Module, blocks: tuple[int, ...] = (-2, -1)) -> None:
        super().__init__()
        self.backbone, self.blocks = backbone, blocks
        self.head = nn.Conv2d(len(blocks) * backbone.embed_dim, 1, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images, self.blocks)
        patches = torch.cat([layer.patches for layer in tokens], dim=1)  # (B, blocks · D, h, w)
        return F.interpolate(self.head(patches), images.shape[-2:], mode="bilinear")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        return F.binary_cross_entropy_with_logits(self(images)[:, 0], masks.float())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        found = self(images)[:, 0] > 0
        overlap = (found & masks).sum(dim=(1, 2)) / (found | masks).sum(dim=(1, 2))
        self.log("iou", overlap.mean(), batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-2)


def loader(first: int, count: int) -> DataLoader:
    images, _, masks = Scenes(count, first).tensors()
    return DataLoader(TensorDataset(normalize(images, IMAGENET_MEAN, IMAGENET_STD), masks), batch_size=16)


def main(checkpoint: str, epochs: int = 60) -> float:
    backbone = DINOModule.load_from_checkpoint(checkpoint, map_location="cpu").as_backbone()
    segmenter = Segmenter(backbone)
    trainer = Trainer(max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False, log_every_n_steps=1,
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(segmenter, loader(first=10**6, count=64))
    return trainer.test(segmenter, loader(first=2 * 10**6, count=256))[0]["iou"]


if __name__ == "__main__":
    print(f"overlap (IoU) with the true objects: {main(sys.argv[1]):.3f}")
