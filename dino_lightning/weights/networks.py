"""Networks for given weights: what a ViT or a ResNet must be like to take them."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer, build
from dino_lightning.backbones.vit import VIT_SIZES

_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_HEADS = {(width, depth): heads for width, depth, heads in VIT_SIZES.values()}


def facts_of(vit: VisionTransformer) -> dict[str, Any]:
    """What the weights of a ViT do not tell of it, as plain types: arguments of VisionTransformer."""
    return {
        "img_size": [side * vit.patch_size for side in vit.grid],
        "num_heads": vit.blocks[0].attn.num_heads,
        "norm_eps": vit.norm.eps,
        "position_offset": vit.position_offset,
        "position_antialias": vit.position_antialias,
    }


def network_for(weights: Mapping[str, Tensor], facts: Mapping[str, Any], drop_path_rate: float = 0.0) -> nn.Module:
    """An untrained network of the shapes of these weights: a ``VisionTransformer``, or a ResNet of torchvision.

    Args:
        weights: of a backbone, in our names.
        facts: what else is known of a ViT, arguments of VisionTransformer.
        drop_path_rate: of a ViT.

    Raises:
        ValueError: if they are of another kind, or leave open what the network is.
    """
    if "pos_embed" in weights and "patch_embed.proj.weight" in weights:
        return VisionTransformer(**_vit_arguments(weights, facts), drop_path_rate=drop_path_rate)
    if "conv1.weight" in weights and "layer1.0.conv1.weight" in weights:
        counts = tuple(sum(f"layer{i}.{j}.conv1.weight" in weights for j in range(64)) for i in range(1, 5))
        name = _RESNETS.get((counts, "layer1.0.conv3.weight" in weights))
        if name is None:
            raise ValueError(f"these are weights of a ResNet with {counts} blocks, which torchvision does not have")
        return build(name, in_chans=weights["conv1.weight"].shape[1])
    raise ValueError(
        f"these are weights neither of a ViT (pos_embed, patch_embed.proj.weight, blocks.0...) nor of a ResNet (conv1.weight, "
        f"layer1.0...), but {', '.join(list(weights)[:5])}"
    )


def _vit_arguments(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    projection, registers = weights["patch_embed.proj.weight"], weights.get("register_tokens")
    width, in_chans, patch_size = projection.shape[:3]
    depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in weights)
    swiglu = "blocks.0.mlp.w12.weight" in weights
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    arguments = {
        "img_size": _sides(weights["pos_embed"].shape[1] - 1, patch_size, facts.get("img_size")),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": facts.get("num_heads") or _HEADS.get((width, depth)),
        "mlp_ratio": 4.0 if swiglu or hidden is None else hidden.shape[0] / width,
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "ffn": "swiglu" if swiglu else "mlp",
        # DINOv2 interpolates positions as DINO does, its networks with registers otherwise.
        "position_offset": facts.get("position_offset", 0.1 if registers is None else 0.0),
        "position_antialias": facts.get("position_antialias", registers is not None),
        "norm_eps": facts.get("norm_eps", 1e-6),
    }
    if arguments["num_heads"] is None:
        raise ValueError(
            f"the weights are of a ViT of width {width} and depth {depth}, and do not tell how many attention heads it has; "
            "give num_heads"
        )
    return arguments


def _sides(patches: int, patch_size: int, img_size: Any) -> tuple[int, int]:
    """(H, W) in pixels of the positions' grid."""
    if img_size is not None:
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if (sides[0] // patch_size) * (sides[1] // patch_size) == patches:
            return sides
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"the {patches} positions are of no square image, and nothing says of which; give img_size=(H, W)")
    return side * patch_size, side * patch_size
