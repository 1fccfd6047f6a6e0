"""``dino-lightning export``: a trained backbone for other tools."""

import copy
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

import dino_lightning
from dino_lightning.backbones import VisionTransformer
from dino_lightning.methods.base import Method
from dino_lightning.tools.checkpoint import images_of, is_ours, load_module, training_size
from dino_lightning.weights.export import export as write
from dino_lightning.weights.package import Package

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
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        to: torchhub: a state dict in the reference's names; timm, transformers: folders that these load; torchvision: a state
            dict of its ResNets; safetensors: for load_backbone; onnx, torch_export: graphs for any batch of one size.
        output: the folder, which must not be there yet.
        image_size: height and width in pixels to whose grid a ViT's positions are interpolated, once and for all, as other
            tools do that otherwise (torchhub's do it as ours: there a square only); by default that of the training.
        network: the teacher, which is better, or the student.
        with_head: keep the projection head (torchhub, safetensors), to train on.
        mean: per channel; by default the training's.
        std: per channel, likewise.
    """
    if with_head and not is_ours(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint of dino-lightning fit, whose head could be kept; leave with_head out")
    module = load_module(checkpoint, network).cpu()
    trained, shown = getattr(module, network, module.evaluated), images_of(module, None, mean, std)
    if with_head and not hasattr(trained, "head"):
        raise ValueError(f"{checkpoint} is of {module.title}, whose heads none of the forms has a place for; leave with_head out")
    package = Package(
        backbone=copy.deepcopy(trained.backbone).eval(),
        **shown._replace(size=tuple(image_size or shown.size))._asdict(),
        head=trained.head.state_dict() if with_head else None,
        center=module.loss.center if with_head else None,
    )
    folder = write(package, to, output, card=_card(checkpoint, package, network, module))
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}; README.md says how to load it")


def _card(checkpoint: str, package: Package, network: str, module: Method) -> str:
    """Architecture, data, recipe, k-NN, command and version, as far as the run's folder tells them."""
    backbone, ours = package.backbone, is_ours(checkpoint)
    config = _run_config(checkpoint) if ours else {}
    size = f"{package.size[0]}×{package.size[1]}"
    if isinstance(backbone, VisionTransformer):
        heads = backbone.blocks[0].attn.num_heads
        shape = f"ViT, width {backbone.embed_dim}, {len(backbone.blocks)} blocks, {heads} heads, patches of {backbone.patch_size} pixels"
    else:
        shape = type(backbone).__name__
    which = f", the {network}" if hasattr(module, network) else ""
    rows = {
        "architecture": f"{shape}, {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} million parameters",
        "images": f"{size} pixels, {package.in_chans} channels in [0, 1], minus {package.mean}, divided by {package.std}",
        "trained": f"{module.title} (self-supervised, without labels){which}" if ours else f"elsewhere: {checkpoint}",
        **_crops(module),
        **(_history(checkpoint, config) if ours else {}),
        "exported by": f"dino_lightning {dino_lightning.__version__}, torch {torch.__version__}",
        "command": f"`{' '.join(['dino-lightning', *sys.argv[1:]])}`",
    }
    return "\n".join(
        [
            f"# A backbone{f' trained with {module.title}' if ours else ''}\n",
            "| | |",
            "|---|---|",
            *(f"| {k} | {v} |" for k, v in rows.items()),
            "",
        ]
    )


def _run_config(checkpoint: str) -> dict[str, Any]:
    """The configuration of the run, kept beside its checkpoints; empty where it is not there."""
    file = Path(checkpoint).resolve().parent.parent / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def _crops(module: Method) -> dict[str, str]:
    """The size that was trained: the global crops of the run, or where that is not known, the size of a ViT's positions."""
    size = module.images.get("size")
    if size is None and not isinstance(module.evaluated.backbone, VisionTransformer):
        return {}
    height, width = training_size(module)
    return {"trained at": f"{height}×{width} pixels" + " (global crops)" * (size is not None)}


def _history(checkpoint: str, config: dict[str, Any]) -> dict[str, str]:
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    steps = saved["global_step"]
    rows = {"steps": f"{steps}, of {saved['layout']['images_per_step']} images" if "layout" in saved else str(steps)}
    for callback in saved.get("callbacks", {}).values():
        score = callback.get("current_score") if isinstance(callback, dict) and callback.get("monitor") == "val/knn_top1" else None
        if score is not None:
            rows["k-NN top-1"] = f"{100 * float(score):.1f} % on the run's own labelled images, at its last validation"
    if config:
        rows["data"] = str((config.get("data") or {}).get("root"))
        model = {name: value for name, value in (config.get("model") or {}).items() if value is not None}
        rows["options"] = ", ".join(f"{name} {value}" for name, value in model.items() if name != "backbone")
    return rows
