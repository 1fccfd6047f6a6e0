"""What the tools need of a checkpoint: the module on the device, and the size it was trained at."""

import torch

from dino_lightning.backbones import VisionTransformer
from dino_lightning.module import DINOModule


def load_module(checkpoint: str) -> DINOModule:
    """The module of a checkpoint of ``dino-lightning fit``, in evaluation mode, on the accelerator if there is one."""
    module = DINOModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    return module.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def training_size(module: DINOModule) -> int:
    """Pixels of the side of its global crops, as far as the module knows it."""
    backbone = module.teacher.backbone
    if isinstance(backbone, VisionTransformer):
        return backbone.grid[0] * backbone.patch_size
    size = module.options["img_size"]
    return size if isinstance(size, int) else size[0]
