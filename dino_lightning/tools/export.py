"""``dino-lightning export``: a trained backbone for other tools."""

import copy
import sys
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import nn

import dino_lightning
from dino_lightning.backbones import VisionTransformer
from dino_lightning.module import DINOModule
from dino_lightning.painting import IMAGENET_MEAN, IMAGENET_STD, channel_numbers
from dino_lightning.tools.checkpoint import load_module, training_size
from dino_lightning.weights import load_backbone
from dino_lightning.weights.export import Package
from dino_lightning.weights.export import export as write

_Form = Literal["torchhub", "timm", "transformers", "torchvision", "safetensors", "onnx", "torch_export"]


def export(
    checkpoint: str,
    to: _Form,
    output: str = "exported",
    image_size: tuple[int, int] | None = None,
    network: Literal["teacher", "student"] = "teacher",
    with_head: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> None:
    """Writes a folder with the backbone of a checkpoint in the form of another tool, and a model card.

    Args:
        checkpoint: a checkpoint of dino-lightning fit, or whatever load_backbone takes.
        to: torchhub: a state dict in the reference's names; timm, transformers: folders that these load; torchvision: a state
            dict of its ResNets; safetensors: for load_backbone; onnx, torch_export: graphs for any batch of one size.
        output: the folder, which must not be there yet.
        image_size: height and width in pixels to whose grid a ViT's positions are interpolated, once and for all, as other
            tools do that otherwise; by default that of the training.
        network: the teacher, which is better, or the student.
        with_head: keep the projection head (torchhub, safetensors), to train on.
        mean: per channel, as in the training; by default ImageNet's, or 0.5 for other channel counts.
        std: per channel, likewise.
    """
    module = _module(checkpoint)
    if module is not None:
        trained = getattr(module, network)
        backbone, head, center = copy.deepcopy(trained.backbone).cpu(), trained.head.state_dict(), module.loss.center
        in_chans, size = module.options["in_chans"], training_size(module)
    elif with_head:
        raise ValueError(f"{checkpoint} is no checkpoint of dino-lightning fit, whose head could be kept; leave with_head out")
    else:
        backbone, head, center = load_backbone(checkpoint, network=network), None, None
        in_chans = next(m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d))
        size = _grid_size(backbone)
    package = Package(
        backbone=backbone.eval(),
        size=tuple(image_size or size),
        in_chans=in_chans,
        mean=channel_numbers("mean", mean, IMAGENET_MEAN, in_chans),
        std=channel_numbers("std", std, IMAGENET_STD, in_chans),
        head={name: value.cpu() for name, value in head.items()} if with_head else None,
        center=center.cpu() if with_head else None,
    )
    folder = write(package, to, output, card=_card(checkpoint, module, package, network))
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}; README.md says how to load it")


def _module(checkpoint: str) -> DINOModule | None:
    """The module of a checkpoint of ours, None if it is something else."""
    if Path(checkpoint).suffix != ".ckpt":
        return None
    return load_module(checkpoint).cpu()


def _grid_size(backbone: nn.Module) -> tuple[int, int]:
    if isinstance(backbone, VisionTransformer):
        return backbone.grid[0] * backbone.patch_size, backbone.grid[1] * backbone.patch_size
    return 224, 224


def _card(checkpoint: str, module: DINOModule | None, package: Package, network: str) -> str:
    """Architecture, data, recipe, k-NN, command and version, as far as the run's folder tells them."""
    backbone = package.backbone
    size = f"{package.size[0]}×{package.size[1]}"
    if isinstance(backbone, VisionTransformer):
        shape = f"ViT, width {backbone.embed_dim}, {len(backbone.blocks)} blocks, {backbone.blocks[0].attn.num_heads} heads, patches of {backbone.patch_size} pixels"
    else:
        shape = type(backbone).__name__
    rows = {
        "architecture": f"{shape}, {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} million parameters",
        "images": f"{size} pixels, {package.in_chans} channels in [0, 1], minus {package.mean}, divided by {package.std}",
        "trained": f"DINO (self-supervised, without labels), the {network}" if module else f"elsewhere: {checkpoint}",
        **(_history(checkpoint) if module else {}),
        "exported by": f"dino_lightning {dino_lightning.__version__}, torch {torch.__version__}: `{' '.join(['dino-lightning', *sys.argv[1:]])}`",
    }
    return "\n".join(["# A backbone trained with DINO\n", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""])


def _history(checkpoint: str) -> dict[str, str]:
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    steps = saved["global_step"]
    rows = {"steps": f"{steps}, of {saved['layout']['images_per_step']} images" if "layout" in saved else str(steps)}
    for callback in saved.get("callbacks", {}).values():
        score = callback.get("current_score") if isinstance(callback, dict) and callback.get("monitor") == "val/knn_top1" else None
        if score is not None:
            rows["k-NN top-1"] = f"{100 * float(score):.1f} % on the run's own labelled images, at its last validation"
    config = Path(checkpoint).resolve().parent.parent / "config.yaml"
    if config.is_file():
        options = yaml.safe_load(config.read_text())
        rows["data"] = str((options.get("data") or {}).get("root"))
        model = {name: value for name, value in (options.get("model") or {}).items() if value is not None}
        rows["options"] = ", ".join(f"{name} {value}" for name, value in model.items() if name != "backbone")
    return rows
