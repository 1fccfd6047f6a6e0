"""Backbones for transformers: a folder that ``AutoModel.from_pretrained("FOLDER")`` loads."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_lightning.backbones import VisionTransformer
from dino_lightning.weights.package import Package

# Ours to theirs, in files; their query, key and value stand apart.
_NAMES = (
    (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
)
_NAMES_OF_VIT = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def write_transformers(package: Package, folder: Path) -> str:
    """``config.json``, ``model.safetensors`` and ``preprocessor_config.json``: a ViTModel, or for patches of 14 pixels, LayerScale,
    SwiGLU and registers a Dinov2Model (WithRegisters).

    Raises:
        ModuleNotFoundError: without transformers.
        ValueError: if transformers has no such network.
    """
    vit = package.backbone
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"transformers has no {type(vit).__name__} of this form; choose timm, torchvision or onnx")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers", name="transformers") from error
    square = vit.grid[0] == vit.grid[1]
    dinov2 = vit.layer_scale is not None or vit.register_tokens is not None or hasattr(vit.blocks[0].mlp, "w12")
    if dinov2 and not square:
        raise ValueError(
            f"a Dinov2Model cannot keep positions of a grid that is not square, {vit.grid[0]}×{vit.grid[1]}; choose a square "
            "image_size, or timm, torchhub or onnx"
        )
    shape = {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.blocks[0].attn.num_heads,
        "image_size": package.size[0] if square else list(package.size),
        "patch_size": vit.patch_size,
        "num_channels": package.in_chans,
        "layer_norm_eps": vit.norm.eps,
    }
    if dinov2 or (vit.patch_size == 14 and square):
        config, weights = _dinov2(vit, shape, transformers)
    else:
        hidden = vit.blocks[0].mlp.fc1.out_features
        config, weights = transformers.ViTConfig(**shape, intermediate_size=hidden), _renamed(vit, _NAMES_OF_VIT + _NAMES)
        weights.pop("embeddings.mask_token", None)  # a ViTModel has none
        config.architectures = ["ViTModel"]
    config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    height, width = package.size
    transformers.ViTImageProcessor(
        size={"height": height, "width": width}, resample=3, image_mean=list(package.mean), image_std=list(package.std)
    ).save_pretrained(folder)
    pooler = ", add_pooling_layer=False" if config.architectures == ["ViTModel"] else ""
    return f'''import torch
import transformers

model = transformers.{config.architectures[0]}.from_pretrained("FOLDER"{pooler})
images = torch.rand({package.batch})  # yours, normalised as said above
features = model(images).last_hidden_state[:, 0]'''


def _dinov2(vit: VisionTransformer, shape: dict[str, Any], transformers: Any) -> tuple[Any, dict[str, Tensor]]:
    """A plain ViT is one whose gains are 1."""
    mlp = vit.blocks[0].mlp
    swiglu = hasattr(mlp, "w12")
    ratio = 4 if swiglu else mlp.fc1.out_features / vit.embed_dim
    if ratio != int(ratio):
        raise ValueError(f"a Dinov2Model needs a whole mlp_ratio, this network has {ratio:g}")
    if swiglu and mlp.w3.in_features != (int(4 * vit.embed_dim * 2 / 3) + 7) // 8 * 8:
        raise ValueError(f"a Dinov2Model with SwiGLU has mlp_ratio 4, this network a hidden width of {mlp.w3.in_features}")
    shape = {**shape, "mlp_ratio": int(ratio), "use_swiglu_ffn": swiglu}
    weights = _renamed(vit, _NAMES)
    weights.setdefault("embeddings.mask_token", torch.zeros(1, vit.embed_dim))
    if vit.layer_scale is None:
        gains = [f"encoder.layer.{i}.layer_scale{j}.lambda1" for i in range(len(vit.blocks)) for j in (1, 2)]
        weights |= {name: torch.ones(vit.embed_dim) for name in gains}
    if vit.register_tokens is None:
        config, name = transformers.Dinov2Config(**shape), "Dinov2Model"
    else:
        count = vit.register_tokens.shape[1]
        config, name = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=count), "Dinov2WithRegistersModel"
    config.architectures = [name]
    return config, weights


def _renamed(vit: VisionTransformer, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    weights = {}
    for name, value in vit.state_dict().items():
        parts = zip(("query", "key", "value"), value.chunk(3)) if ".attn.qkv." in name else [("", value)]
        for part, tensor in parts:
            theirs = name.replace(".attn.qkv.", f".attention.attention.{part}.")
            for pattern, replacement in names:
                theirs = re.sub(pattern, replacement, theirs)
            weights[theirs] = tensor
    return weights
