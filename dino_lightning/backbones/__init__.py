"""Backbones: modules that map images (B, C, H, W) to features (B, D), by name or as given."""

import copy
import difflib
import logging
from typing import Literal

import torch
from torch import nn

from dino_lightning.backbones.classifier import warn_of_classifier
from dino_lightning.backbones.cnn import cnn_names, torchvision_cnn
from dino_lightning.backbones.features import example_images, feature_dim, features_at, freeze_unused
from dino_lightning.backbones.timm import timm_model
from dino_lightning.backbones.vit import VIT_SIZES, VisionTransformer

__all__ = [
    "VisionTransformer",
    "build",
    "example_images",
    "feature_dim",
    "features_at",
    "freeze_unused",
    "redrawn",
    "warn_of_classifier",
]

log = logging.getLogger(__name__)

_DINOV2 = {f"dinov2_{short}14": size for short, size in zip(("vits", "vitb", "vitl", "vitg"), list(VIT_SIZES)[1:])}


def build(
    name: str,
    *,
    patch_size: int = 16,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    registers: int = 0,
    layer_scale: float | None = None,
    ffn: Literal["mlp", "swiglu"] = "mlp",
    mask_token: bool = False,
    drop_path_uniform: bool = False,
) -> nn.Module:
    """An untrained backbone by name: a ViT of ``VIT_SIZES``, a torchvision CNN, or ``timm/NAME``. Never touches the network.

    ``dinov2_vits14``, ``b``, ``l`` and ``g``, with ``_reg`` for four registers, are the ViTs of DINOv2, whose patches have 14 pixels;
    they bring their own ``registers``, ``layer_scale`` and ``ffn``. What these options mean, ``VisionTransformer`` says.

    Raises:
        ValueError: for an unknown name, listing what there is; for options that a backbone of this name does not have.
    """
    if name in VIT_SIZES:
        embed_dim, depth, num_heads = VIT_SIZES[name]
        return VisionTransformer(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, drop_path_rate=drop_path_rate, registers=registers,
            layer_scale=layer_scale, ffn=ffn, mask_token=mask_token, drop_path_uniform=drop_path_uniform,
        )  # fmt: skip
    if name.removesuffix("_reg") in _DINOV2:
        embed_dim, depth, num_heads = VIT_SIZES[_DINOV2[name.removesuffix("_reg")]]
        own = 4 if name.endswith("_reg") else 0
        if registers not in (0, own):
            raise ValueError(f"{name} has {own} registers, not {registers}; choose {name.removesuffix('_reg')}_reg for 4, or a vit_* name")
        return VisionTransformer(
            img_size, 14, in_chans, embed_dim, depth, num_heads, drop_path_rate=drop_path_rate, registers=own,
            layer_scale=1e-5, ffn="swiglu" if name.startswith("dinov2_vitg") else "mlp",
            position_offset=0.0 if own else 0.1, position_antialias=bool(own),
            mask_token=mask_token, drop_path_uniform=drop_path_uniform,
        )  # fmt: skip
    if name.startswith("timm/") or name in cnn_names():
        options = {"registers": registers, "mask_token": mask_token, "drop_path_uniform": drop_path_uniform, "layer_scale": layer_scale}
        options |= {"ffn": ffn} if ffn != "mlp" else {}
        asked = ", ".join(f"{option}={value}" for option, value in options.items() if value)
        if asked:
            vits = ", ".join([*VIT_SIZES, *_DINOV2])
            raise ValueError(f"{name} takes no {asked}: only a VisionTransformer has this; choose one of {vits}")
    if name.startswith("timm/"):
        return timm_model(name.removeprefix("timm/"), img_size, in_chans, drop_path_rate)
    if name in cnn_names():
        return torchvision_cnn(name, in_chans, drop_path_rate)
    own = [*VIT_SIZES, *_DINOV2]
    close = difflib.get_close_matches(name, [*own, *cnn_names()], 1)
    hint = f"did you mean {close[0]!r}? There are" if close else "there are"
    if "." in name:
        hint = "a class is given as an object, or on the command line by --model.backbone.class_path. There are"
    raise ValueError(
        f"unknown backbone {name!r}; {hint} {', '.join(own)} (or with _reg), timm/NAME (with timm installed), "
        f"any nn.Module, and torchvision's {', '.join(cnn_names())}"
    )


def redrawn(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the backbone in evaluation mode with its weights drawn anew: to see what the features are worth untrained.

    Parameters that none of its modules' ``reset_parameters`` draws stay as they are, and the log names them.
    """
    device = next(backbone.parameters()).device
    copied = copy.deepcopy(backbone).cpu()
    drawn = set()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part in reversed(list(copied.modules())):  # the whole last: it may overrule its parts
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
                drawn.update(part.parameters(recurse=False))
    kept = [name for name, parameter in copied.named_parameters() if parameter not in drawn]
    if kept:
        log.warning("not drawn anew, since nothing says how: %s", ", ".join(kept))
    return copied.to(device).eval()
