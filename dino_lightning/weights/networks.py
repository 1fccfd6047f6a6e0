"""Networks for given weights: what a ViT or a ResNet must be like to take them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer, build
from dino_lightning.backbones.features import first_convolution
from dino_lightning.backbones.positions import height_width
from dino_lightning.backbones.small_resnet import SmallResNet
from dino_lightning.backbones.vit import VIT_SIZES

_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_HEADS = {(width, depth): heads for width, depth, heads in VIT_SIZES.values()}


def facts_of(backbone: nn.Module) -> dict[str, Any]:
    """What its weights do not tell of a network of ours, as plain types: arguments of VisionTransformer or SmallResNet; of others nothing."""
    if isinstance(backbone, SmallResNet):
        return {"stem_stride": first_convolution(backbone)[1].stride[0], "grid": backbone.grid}
    if not isinstance(backbone, VisionTransformer):
        return {}
    return {
        "img_size": [side * backbone.patch_size for side in backbone.grid],
        "num_heads": backbone.blocks[0].attn.num_heads,
        "norm_eps": backbone.norm.eps,
        "position_offset": backbone.position_offset,
        "position_antialias": backbone.position_antialias,
        "mask_token": backbone.mask_token is not None,  # published files have one as well, which features do not need
        "drop_path_uniform": backbone.drop_path_uniform,
    }


def heads_of(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int | None:
    """Attention heads of a ViT: what is known, or those of the usual shape; None for others."""
    width, depth = weights["patch_embed.proj.weight"].shape[0], _depth(weights)
    return facts.get("num_heads") or _HEADS.get((width, depth))


def network_for(
    weights: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    drop_path_rate: float = 0.0,
    wanted_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """An untrained network of the shapes of these weights: a ``VisionTransformer``, a ``SmallResNet``, or a ResNet of torchvision.

    Args:
        weights: of a backbone, in our names.
        facts: what else is known of it (``facts_of``).
        drop_path_rate: of a ViT.
        wanted_size: pixels, int or (H, W): the size of a ViT's positions, where they are of no square and nobody says of what.

    Raises:
        ValueError: if they are of another kind, or leave open what the network is.
    """
    if "pos_embed" in weights and "patch_embed.proj.weight" in weights:
        arguments = vit_arguments(weights, facts, wanted_size)
        if arguments["num_heads"] is None:
            raise ValueError(
                f"the weights are of a ViT of width {arguments['embed_dim']} and depth {arguments['depth']}, and do not tell how many "
                "attention heads it has; give num_heads"
            )
        return VisionTransformer(**arguments, drop_path_rate=drop_path_rate)
    if "conv1.weight" in weights and "layer1.0.conv1.weight" in weights:
        counts = tuple(sum(f"layer{i}.{j}.conv1.weight" in weights for j in range(64)) for i in range(1, 5))
        name = _RESNETS.get((counts, "layer1.0.conv3.weight" in weights))
        if name is None:
            raise ValueError(f"these are weights of a ResNet with {counts} blocks, which torchvision does not have")
        return build(name, in_chans=weights["conv1.weight"].shape[1])
    if "stages.0.0.weight" in weights:
        arguments = small_resnet_arguments(weights) | {name: facts[name] for name in ("stem_stride", "grid") if name in facts}
        if len(arguments) < 5:
            told = ", ".join(f"{name}={value}" for name, value in arguments.items())
            raise ValueError(
                f"these are weights of a SmallResNet({told}), and do not tell its stem_stride and grid; build it with these, and load them "
                "by load_state_dict"
            )
        return SmallResNet(**arguments)
    raise ValueError(
        f"these are weights neither of a ViT (pos_embed, patch_embed.proj.weight, blocks.0...) nor of a ResNet (conv1.weight, "
        f"layer1.0...) nor of a SmallResNet (stages.0.0.weight), but {', '.join(list(weights)[:5])}"
    )


def resnet_name(backbone: nn.Module) -> str | None:
    """By what name torchvision and timm build it; None if it is no plain ResNet of torchvision."""
    if type(backbone).__module__ != "torchvision.models.resnet" or backbone.base_width != 64 or backbone.groups != 1:
        return None
    blocks = tuple(len(getattr(backbone, f"layer{i}")) for i in range(1, 5))
    return _RESNETS.get((blocks, hasattr(backbone.layer1[0], "conv3")))


def small_resnet_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Those arguments of the SmallResNet of these weights that they tell."""
    names = [name for name in weights if re.fullmatch(r"stages\.\d+\.0\.weight", name)]
    stages = [weights[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))]  # safetensors sorts 11 before 6
    branches = sum(name.endswith(".branch.0.0.weight") for name in weights)
    return {
        "in_chans": stages[0].shape[1],
        "widths": tuple(len(stage) for stage in stages),
        "blocks": branches // (len(stages) - 1),
    }


def vit_arguments(weights: Mapping[str, Tensor], facts: Mapping[str, Any], wanted_size: int | Sequence[int] | None) -> dict[str, Any]:
    """Arguments of the VisionTransformer of these weights; num_heads is None where nothing tells."""
    projection, registers = weights["patch_embed.proj.weight"], weights.get("register_tokens")
    width, in_chans, patch_size = projection.shape[:3]
    swiglu = "blocks.0.mlp.w12.weight" in weights
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    arguments = {
        "img_size": _sides(weights["pos_embed"].shape[1] - 1, patch_size, facts.get("img_size"), wanted_size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": _depth(weights),
        "num_heads": heads_of(weights, facts),
        "mlp_ratio": _swiglu_ratio(weights, width) if swiglu else ratio(hidden.shape[0], width) if hidden is not None else 4.0,
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "ffn": "swiglu" if swiglu else "mlp",
        # DINOv2 interpolates positions as DINO does, its networks with registers otherwise.
        "position_offset": facts.get("position_offset", 0.1 if registers is None else 0.0),
        "position_antialias": facts.get("position_antialias", registers is not None),
        "norm_eps": facts.get("norm_eps", 1e-6),
        "mask_token": facts.get("mask_token", False),
        "drop_path_uniform": facts.get("drop_path_uniform", False),
    }
    return arguments


def ratio(hidden: int, width: int) -> float:
    """The mlp_ratio with which int(width · ratio) is the hidden width."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _swiglu_ratio(weights: Mapping[str, Tensor], width: int) -> float:
    return 1.5 * weights["blocks.0.mlp.w3.weight"].shape[1] / width  # what is lost by rounding, rounding up to eights restores


def _depth(weights: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in weights)


def _sides(patches: int, patch_size: int, known: int | Sequence[int] | None, wanted: int | Sequence[int] | None) -> tuple[int, int]:
    """(H, W) in pixels of the positions' grid: what is known, else a square, else what is wanted."""
    side = math.isqrt(patches) * patch_size
    for size in (known, side, wanted):
        sides = height_width(size or 0)
        if (sides[0] // patch_size) * (sides[1] // patch_size) == patches:
            return sides
    raise ValueError(f"the {patches} positions are of no square image, and nothing says of which; give img_size=(H, W)")
