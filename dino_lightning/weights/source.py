"""Where weights come from: a file, a folder, a published name, a network of another library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from dino_lightning.backbones import VisionTransformer
from dino_lightning.weights.files import read
from dino_lightning.weights.layouts import head_of, in_our_names, part_of, unwrapped
from dino_lightning.weights.networks import facts_of, heads_of
from dino_lightning.weights.published import PUBLISHED, fetch, remember


class Source(NamedTuple):
    """``backbone``: weights in our names; ``plain``: in their own; ``head``: of the projection head, empty without; ``facts``: what else
    is known of the network; ``center``: of the loss, None without; ``name``: for people; ``published``: whether nothing may be left over
    but a classifier; ``module``: the network of another library that the weights are of, to compare features with.
    """

    backbone: dict[str, Tensor]
    plain: dict[str, Tensor]
    head: dict[str, Tensor]
    facts: dict[str, Any]
    center: Tensor | None
    name: str
    published: bool = False
    module: nn.Module | None = None


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
        path = fetch(name)
        found = _of_file(*read(path), name, network)
        remember(path)
        facts = {"num_heads": heads_of(found.backbone, {})} if "pos_embed" in found.backbone else {}
        return found._replace(published=True, facts={**found.facts, **facts})
    if name.startswith("timm/"):
        return _of_module(_pretrained_timm(name.removeprefix("timm/")), name)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, network)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {name!r}, and it is no published name either: {', '.join(PUBLISHED)}, or timm/NAME"
        )
    held, facts = read(path)
    if path.name in _OF_FOLDERS:  # its config lies beside it
        facts = {**_config_beside(path), **facts}
    return _of_file(held, facts, name, network)


def _of_file(held: Mapping[str, Any], facts: dict[str, Any], name: str, network: str) -> Source:
    try:
        weights = part_of(held, network)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    # Of the reference, of Lightning, of our safetensors.
    parts = (held.get("dino_loss"), "center"), (held.get("state_dict"), "loss.center"), (held, "loss.center")
    center = next((part[key] for part, key in parts if isinstance(part, Mapping) and key in part), None)
    facts = {**facts, **(held.get("dino_lightning") or {})}
    plain = unwrapped(_without_head(weights))
    return Source(in_our_names(plain, facts.get("img_size")), plain, head_of(weights), facts, center, name)


def _without_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out projection heads (DINO's, DINOv2's), but no classifier: that is for the report to name."""
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    heads = tuple(f"{head}." for head in ("head", "dino_head", "ibot_head") if f"{head}.last_layer.weight_v" in plain)
    return {name: value for name, value in plain.items() if not name.startswith(heads)}


def _of_folder(path: Path, network: str) -> Source:
    """A folder of transformers, of timm, or of our export: config.json and one file of weights."""
    file = next((path / name for name in _OF_FOLDERS if (path / name).is_file()), None)
    if file is None:
        run = path / "checkpoints" / "last.ckpt"
        if run.is_file():
            raise FileNotFoundError(f"{path} is the folder of a run; give the checkpoint in it, {run}")
        raise FileNotFoundError(f"the folder {path} holds none of {', '.join(_OF_FOLDERS)}")
    held, facts = read(file)
    return _of_file(held, {**_config_beside(file), **facts}, str(path), network)


_OF_FOLDERS = ("model.safetensors", "pytorch_model.bin", "backbone.pth", "checkpoint.pth")


def _config_beside(file: Path) -> dict[str, Any]:
    config = file.with_name("config.json")
    if not config.is_file():
        return {}
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is no JSON, or not whole: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{config} holds a {type(said).__name__}, no configuration of a network")
    return _said_by_config(said)


def _said_by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of transformers or timm.

    Raises:
        ValueError: if its networks compute something else than ours.
    """
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"its blocks have the activation {config['hidden_act']}, ours GELU: the features would be others")
    arguments = config.get("model_args", {})  # of timm
    found = {
        "num_heads": config.get("num_attention_heads") or arguments.get("num_heads"),
        "norm_eps": config.get("layer_norm_eps"),
        "img_size": config.get("image_size") or arguments.get("img_size"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_module(module: nn.Module, name: str) -> Source:
    """A network of timm or transformers (or ours): its weights, and its heads and epsilon where it tells them."""
    weights = {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
    if isinstance(module, VisionTransformer):
        return Source(weights, weights, {}, facts_of(module), None, name)
    config = getattr(module, "config", None)
    facts = _said_by_config(config.to_dict()) if hasattr(config, "to_dict") else {}
    attention = next((part for part in module.modules() if hasattr(part, "num_heads")), None)
    if attention is not None and not facts:
        facts["num_heads"] = attention.num_heads
        facts["img_size"] = getattr(getattr(module, "patch_embed", None), "img_size", None)  # of timm
        norm = getattr(module, "norm", None)
        if isinstance(norm, nn.LayerNorm):
            facts["norm_eps"] = norm.eps
    weights = unwrapped(weights)
    return Source(in_our_names(weights, facts.get("img_size")), weights, {}, facts, None, name, module=module)


def _pretrained_timm(name: str) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"'timm/{name}' needs timm: pip install timm", name="timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models('*{name[:5]}*') lists those of a kind")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"timm cannot get the weights of {name} ({error}); on a machine without network, download its model.safetensors "
            "elsewhere and give that file"
        ) from error
