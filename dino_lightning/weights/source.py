"""Where weights come from: a file, a folder, a published name, a network of another library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from dino_lightning.weights.files import read
from dino_lightning.weights.layouts import head_of, in_our_names, part_of
from dino_lightning.weights.published import PUBLISHED, fetch


class Source(NamedTuple):
    """``backbone``: weights in our names; ``head``: of the projection head, empty without; ``facts``: what else is known of a
    ViT; ``center``: of the loss, None without; ``name``: for people; ``published``: whether it must fit without a rest.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    facts: dict[str, Any]
    center: Tensor | None
    name: str
    published: bool = False


def open_source(source: str | Path | nn.Module, network: Literal["teacher", "student"] = "teacher") -> Source:
    """Reads weights from wherever they are.

    Raises:
        FileNotFoundError: if there is neither a file or folder nor a published name.
        ValueError: if it holds no weights.
    """
    if isinstance(source, nn.Module):
        return _of_module(source, type(source).__name__)
    name = str(source)
    if name in PUBLISHED:
        held, facts = read(fetch(name))
        return _of_file(held, facts, name, network)._replace(published=True)
    if name.startswith("timm/"):
        return _of_module(_pretrained_timm(name.removeprefix("timm/")), name)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, network)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {name!r}, and it is no published name either: {', '.join(PUBLISHED)}, or timm/NAME"
        )
    return _of_file(*read(path), name, network)


def _of_file(held: Mapping[str, Any], facts: dict[str, Any], name: str, network: str) -> Source:
    try:
        weights = part_of(held, network)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    loss = held.get("dino_loss")  # of the reference
    center = loss.get("center") if isinstance(loss, Mapping) else (held.get("state_dict") or {}).get("loss.center")
    facts = {**facts, **(held.get("dino_lightning") or {})}
    return Source(in_our_names(_without_head(weights), facts.get("img_size")), head_of(weights), facts, center, name)


def _without_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out a projection head, but no classifier: that is for the report to name."""
    if not head_of(weights):
        return dict(weights)
    return {name: value for name, value in weights.items() if not name.removeprefix("module.").startswith("head.")}


def _of_folder(path: Path, network: str) -> Source:
    """A folder of transformers, of timm, or of our export: config.json and one file of weights."""
    file = next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"the folder {path} holds neither model.safetensors nor pytorch_model.bin")
    held, facts = read(file)
    config = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
    return _of_file(held, {**_said_by_config(config), **facts}, str(path), network)


def _said_by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = config.get("model_args", {})  # of timm
    found = {
        "num_heads": config.get("num_attention_heads") or arguments.get("num_heads"),
        "norm_eps": config.get("layer_norm_eps"),
        "img_size": config.get("image_size") or arguments.get("img_size"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_module(module: nn.Module, name: str) -> Source:
    """A network of timm or transformers (or ours): its weights, and its heads and epsilon where it tells them."""
    config = getattr(module, "config", None)
    facts = _said_by_config(config.to_dict()) if hasattr(config, "to_dict") else {}
    attention = next((part for part in module.modules() if hasattr(part, "num_heads")), None)
    if attention is not None and not facts:
        facts["num_heads"] = attention.num_heads
        facts["img_size"] = getattr(getattr(module, "patch_embed", None), "img_size", None)  # of timm
        norm = getattr(module, "norm", None)
        if isinstance(norm, nn.LayerNorm):
            facts["norm_eps"] = norm.eps
    weights = {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
    return Source(in_our_names(weights, facts.get("img_size")), {}, facts, None, name)


def _pretrained_timm(name: str) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"'timm/{name}' needs timm: pip install timm", name="timm") from error
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"timm cannot get the weights of {name} ({error}); on a machine without network, download its model.safetensors "
            "elsewhere and give that file"
        ) from error
