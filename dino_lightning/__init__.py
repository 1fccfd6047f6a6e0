"""DINO self-supervised learning (Caron et al. 2021) as a PyTorch Lightning package."""

from dino_lightning import evaluation, optim, schedules
from dino_lightning.backbones import VisionTransformer
from dino_lightning.datamodule import MultiCropDataModule
from dino_lightning.head import DINOHead
from dino_lightning.loss import DINOLoss
from dino_lightning.module import DINOModule
from dino_lightning.weights import load_backbone

__all__ = [
    "DINOHead",
    "DINOLoss",
    "DINOModule",
    "MultiCropDataModule",
    "VisionTransformer",
    "evaluation",
    "load_backbone",
    "optim",
    "schedules",
]

__version__ = "0.1.0"
