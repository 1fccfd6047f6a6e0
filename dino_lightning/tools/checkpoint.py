"""What the tools need of a checkpoint: the module on the device, its training size, its weights' hash, its network untrained."""

import hashlib

import torch
from torch import nn

from dino_lightning.backbones import VisionTransformer, build, redrawn
from dino_lightning.module import DINOModule


def load_module(checkpoint: str) -> DINOModule:
    """The module of a checkpoint of ``dino-lightning fit``, in evaluation mode, on the accelerator if there is one."""
    module = DINOModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    return module.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def training_size(module: DINOModule) -> tuple[int, int]:
    """(H, W) in pixels of its global crops, as far as the module knows it."""
    backbone, size = module.teacher.backbone, module.options["img_size"]
    if isinstance(backbone, VisionTransformer):
        return backbone.grid[0] * backbone.patch_size, backbone.grid[1] * backbone.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def weights_hash(module: DINOModule) -> str:
    """SHA-256 (hexadecimal) of the teacher's backbone, on which its features depend: names, shapes and bytes of its state."""
    digest = hashlib.sha256()
    for name, value in module.teacher.backbone.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def untrained(module: DINOModule) -> nn.Module:
    """Its backbone as it was before training, with other random numbers."""
    if module.backbone_name is None:
        return redrawn(module.teacher.backbone)
    shape = {name: module.options[name] for name in ("patch_size", "img_size", "in_chans")}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        backbone = build(module.backbone_name, **shape)
    return backbone.to(module.device).eval()
