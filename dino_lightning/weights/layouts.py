"""How files name a backbone's weights: which part of a file it is, and its names in the reference's spelling."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_lightning.backbones.positions import height_width

_WRAPPERS = ("module.", "backbone.", "_orig_mod.", "vit.", "dinov2.", "dinov2_with_registers.")  # they stand before the names

# Of transformers, on disk and in memory (from its version 5 on); the reference's, timm's and DINOv2's need no more than a word.
_RENAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
    (r"^reg_token$", "register_tokens"),
)
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}


def part_of(held: Mapping[str, Any], network: str) -> Mapping[str, Any]:
    """The named weights of the teacher or the student, with its head where there is one, among what a file holds.

    Raises:
        ValueError: if the file holds the other one alone, or no named weights at all.
    """
    if isinstance(held.get("state_dict"), Mapping):  # of Lightning
        for part in (network, "network"):  # methods without a teacher have one network
            inside = {name.removeprefix(f"{part}."): v for name, v in held["state_dict"].items() if name.startswith(f"{part}.")}
            if inside:
                return inside
    for part in (network, "model", "state_dict"):
        if isinstance(held.get(part), Mapping):
            return _tensors(held[part])
    if "teacher" in held or "student" in held:
        raise ValueError(f"it holds {', '.join(map(str, list(held)[:5]))}, but no {network}")
    return _tensors(held)


def _tensors(held: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"there are no named weights in it, but {', '.join(map(str, list(held)[:5])) or 'nothing'}")
    return weights


def head_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projection head's weights among those of a network; empty if there is none."""
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    head = {name.removeprefix("head."): value for name, value in plain.items() if name.startswith("head.")}
    return head if "last_layer.weight_v" in head else {}


def in_our_names(weights: Mapping[str, Tensor], img_size: Sequence[int] | int | None = None) -> dict[str, Tensor]:
    """The weights of a backbone in the reference's names, those of DINOv2 for what only that has; others keep theirs.

    Args:
        weights: in any layout, without the names of wrappers.
        img_size: pixels, int or (H, W): of the positions, where it is known.
    """
    from_timm = "reg_token" in weights
    renamed = {_rename(name): value for name, value in weights.items()}
    for name in [name for name in renamed if re.search(r"\.(attn\.q|mlp\.gate_proj)\.", name)]:
        _fuse(renamed, name)
    if "pos_embed" in renamed and "cls_token" not in renamed:
        raise ValueError("it is a ViT without a class token, whose features ours cannot give")
    if from_timm and _is_grid(renamed["pos_embed"].shape[1], renamed["patch_embed.proj.weight"].shape[-1], img_size):
        # timm has added the class token's position to the token itself.
        renamed["pos_embed"] = torch.cat([torch.zeros_like(renamed["cls_token"]), renamed["pos_embed"]], dim=1)
    for name in [name for name in renamed if name.endswith(".mlp.fc1.weight")]:
        _name_swiglu(renamed, name.removesuffix("fc1.weight"))
    gains = [name for name in renamed if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]
    if all((renamed[name] == 1).all() for name in gains):  # as our exports to Dinov2Model have them: no LayerScale
        renamed = {name: value for name, value in renamed.items() if name not in gains}
    return renamed


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before them, in whatever order; where some are wrapped, the others are left out."""
    for wrapper in _WRAPPERS:
        inside = {name.removeprefix(wrapper): value for name, value in weights.items() if name.startswith(wrapper)}
        if inside:
            return unwrapped(inside)
    return dict(weights)


def _is_grid(count: int, patch_size: int, img_size: Sequence[int] | int | None) -> bool:
    """Whether so many positions are those of the patches alone."""
    if img_size is None:
        return math.isqrt(count) ** 2 == count
    return math.prod(side // patch_size for side in height_width(img_size)) == count


def _rename(name: str) -> str:
    for pattern, ours in _RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def _fuse(weights: dict[str, Tensor], first: str) -> None:
    """One matrix of what others keep in two or three."""
    ours, parts = next((ours, parts) for ours, parts in _FUSED.items() if f".{parts[0]}." in first)
    names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
    if all(name in weights for name in names):
        weights[first.replace(f".{parts[0]}.", f".{ours}.")] = torch.cat([weights.pop(name) for name in names])


def _name_swiglu(weights: dict[str, Tensor], mlp: str) -> None:
    """timm calls the layers of a SwiGLU fc1 and fc2 as well; its fc1 makes twice what its fc2 takes."""
    out = weights.get(f"{mlp}fc2.weight")
    if out is None or weights[f"{mlp}fc1.weight"].shape[0] != 2 * out.shape[1]:
        return
    for theirs, ours in (("fc1", "w12"), ("fc2", "w3")):
        for kind in ("weight", "bias"):
            weights[f"{mlp}{ours}.{kind}"] = weights.pop(f"{mlp}{theirs}.{kind}")
