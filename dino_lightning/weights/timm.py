"""Backbones for timm: a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_lightning.backbones import VisionTransformer
from dino_lightning.weights.networks import ratio, resnet_name
from dino_lightning.weights.package import Package


def write_timm(package: Package, folder: Path) -> str:
    """``model.safetensors`` and ``config.json``.

    Raises:
        ValueError: if timm has no such network.
    """
    backbone = package.backbone
    if isinstance(backbone, VisionTransformer):
        architecture, arguments, weights = _vit(backbone)
        first, classifier = "patch_embed.proj", "head"
    elif (resnet := resnet_name(backbone)) is not None:
        architecture, arguments, weights = resnet, {}, dict(backbone.state_dict())
        first, classifier = "conv1", "fc"
    else:
        raise ValueError(f"no timm model is known for {type(backbone).__name__}; choose one of the other forms")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": package.backbone(torch.zeros(1, package.in_chans, *package.size)).shape[1],
        "model_args": {**arguments, "in_chans": package.in_chans},
        "pretrained_cfg": {
            "input_size": [package.in_chans, *package.size],
            "fixed_input_size": isinstance(backbone, VisionTransformer),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(package.mean),
            "std": list(package.std),
            "num_classes": 0,
            "first_conv": first,
            "classifier": classifier,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.contiguous() for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return f"""import timm
import torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
images = torch.rand({package.batch})  # yours, normalised as said above
features = model(images)"""


def _vit(vit: VisionTransformer) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and weights in timm's names."""
    weights = {name: value for name, value in vit.state_dict().items() if name != "mask_token"}  # timm's have no place for it
    attention, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    swiglu = hasattr(mlp, "w12")
    hidden = mlp.w12.out_features if swiglu else mlp.fc1.out_features
    if vit.norm.eps != 1e-6:
        raise ValueError(f"timm's ViTs have 1e-6 as epsilon of their norms, this one {vit.norm.eps:g}; choose transformers or onnx")
    arguments = {
        "img_size": [side * vit.patch_size for side in vit.grid],
        "patch_size": vit.patch_size,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": attention.num_heads,
        "mlp_ratio": ratio(hidden, vit.embed_dim),
        "init_values": vit.layer_scale,
    }
    if vit.register_tokens is not None:
        arguments |= {"reg_tokens": vit.register_tokens.shape[1], "no_embed_class": True}
        weights["reg_token"] = weights.pop("register_tokens")
        positions = weights["pos_embed"]  # timm adds none to the class token
        weights["cls_token"], weights["pos_embed"] = weights["cls_token"] + positions[:, :1], positions[:, 1:]
    for theirs, ours in (("fc1", "w12"), ("fc2", "w3")) if swiglu else ():
        for i in range(len(vit.blocks)):
            for kind in ("weight", "bias"):
                weights[f"blocks.{i}.mlp.{theirs}.{kind}"] = weights.pop(f"blocks.{i}.mlp.{ours}.{kind}")
    return "vit_giant_patch14_dinov2" if swiglu else "vit_small_patch16_224", arguments, weights
