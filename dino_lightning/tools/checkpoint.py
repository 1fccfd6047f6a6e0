"""What the tools need of a checkpoint: the module on the device, its training size, its weights' hash, its network untrained."""

import hashlib
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from dino_lightning.backbones import VisionTransformer, build, redrawn
from dino_lightning.backbones.features import first_convolution
from dino_lightning.backbones.positions import height_width
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, channel_numbers
from dino_lightning.methods import method_class
from dino_lightning.methods.base import Method
from dino_lightning.methods.dino import DINOModule
from dino_lightning.weights import load_backbone
from dino_lightning.weights.files import read_checkpoint


def load_module(checkpoint: str, network: Literal["teacher", "student"] = "teacher") -> Method:
    """The module of a checkpoint of ``dino-lightning fit``, in evaluation mode, on the accelerator if there is one.

    Whatever else ``load_backbone`` takes comes as the backbone of a module with an untrained head.

    Args:
        checkpoint: a ``.ckpt`` file, or a source of ``load_backbone``.
        network: which one of a whole checkpoint of the reference; a ``.ckpt`` comes with both.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of a method, or its weights are of another network than it says.
    """
    if not is_ours(checkpoint):
        return _on_device(_with_backbone(load_backbone(checkpoint, network=network)))
    saved = read_checkpoint(checkpoint)
    weights = saved.get("state_dict", {}) if isinstance(saved, dict) else {}
    if not any(name.split(".")[1:2] == ["backbone"] for name in weights):  # of the teacher, or of the only network
        held = ", ".join(list(saved)[:5]) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{checkpoint} holds no DINOModule, but {held}; expected a checkpoint of dino-lightning fit")
    try:
        module = method_class(saved.get("method", "dino")).load_from_checkpoint(checkpoint, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"the weights in {checkpoint} are of another network than its options describe: {error}") from error
    except ArgumentError as error:  # a backbone whose class is not here, or is none
        reason = " ".join(str(error).split())
        raise ValueError(f"the options in {checkpoint} do not build its network: {reason}; give what it was trained with") from error
    return _on_device(module)


def is_ours(checkpoint: str) -> bool:
    """Whether it is, by its name, a checkpoint of ``dino-lightning fit``."""
    return Path(checkpoint).suffix == ".ckpt"


def _with_backbone(backbone: nn.Module) -> DINOModule:
    size = [side * backbone.patch_size for side in backbone.grid] if isinstance(backbone, VisionTransformer) else (224, 224)
    in_chans = first_convolution(backbone)[1].in_channels
    return DINOModule(backbone, img_size=tuple(size), in_chans=in_chans, out_dim=2, hidden_dim=8, bottleneck_dim=8).eval()


def _on_device(module: Method) -> Method:
    return module.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


class Images(NamedTuple):
    """What a network of a checkpoint is shown: views of ``size`` (H, W) in pixels, normalised by a mean and std per channel."""

    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def images_of(
    module: Method, image_size: int | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Images:
    """As in its training, where nothing else is asked for: the one rule of all tools.

    Args:
        module: of a checkpoint, which holds what its images were.
        image_size: pixels of the side, instead of the size of the global crops.
        mean: instead of the training's; ImageNet's if that is not known, or 0.5 for other channel counts than 3.
        std: likewise.
    """
    in_chans = module.options["in_chans"]
    return Images(
        training_size(module) if image_size is None else (image_size, image_size),
        in_chans,
        channel_numbers("mean", module.images.get("mean") if mean is None else mean, IMAGENET_MEAN, in_chans),
        channel_numbers("std", module.images.get("std") if std is None else std, IMAGENET_STD, in_chans),
    )


def training_size(module: Method) -> tuple[int, int]:
    """(H, W) in pixels of its global crops; of weights of other origins, of the grid of their positions."""
    backbone, size = module.evaluated.backbone, module.images.get("size", module.options["img_size"])
    if isinstance(backbone, VisionTransformer) and "size" not in module.images:
        return backbone.grid[0] * backbone.patch_size, backbone.grid[1] * backbone.patch_size
    return height_width(size)


def weights_hash(module: Method) -> str:
    """SHA-256 (hexadecimal) of the evaluated backbone, on which its features depend: names, shapes and bytes of its state."""
    digest = hashlib.sha256()
    for name, value in module.evaluated.backbone.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def networks_of(module: Method, compare: bool) -> dict[str, nn.Module]:
    """The backbone that is evaluated, "trained", and before it, to compare with, "untrained"."""
    return {**({"untrained": untrained(module)} if compare else {}), "trained": module.evaluated.backbone}


def untrained(module: Method) -> nn.Module:
    """Its backbone as it was before training, with other random numbers."""
    if module.backbone_name is None:
        return redrawn(module.evaluated.backbone)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        backbone = build(module.backbone_name, **module.backbone_shape)
    return backbone.to(module.device).eval()
