"""Backbones for other tools: files that they load, with the same features."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_lightning.backbones import VisionTransformer
from dino_lightning.backbones.small_resnet import SmallResNet
from dino_lightning.weights.graphs import write_onnx, write_torch_export
from dino_lightning.weights.networks import facts_of, resnet_name, small_resnet_arguments
from dino_lightning.weights.package import Package
from dino_lightning.weights.timm import write_timm
from dino_lightning.weights.transformers import write_transformers


def export(package: Package, to: str, output: str | Path, card: str = "") -> Path:
    """Writes a new folder ``output`` with a backbone in the form of ``to``, and a model card, README.md.

    Args:
        package: what to write. Its backbone stays as it is.
        to: one of ``FORMS``.
        output: the folder, which must not be there yet. It is whole or not there.
        card: text of the model card above how to load it.

    Raises:
        FileExistsError: if there is something at ``output``.
        ValueError: if this form cannot hold this network, or has no place for a head.
        ModuleNotFoundError: if the library of this form is not installed, saying how to install it.
    """
    if to not in FORMS:
        raise ValueError(f"to must be one of {', '.join(FORMS)}, got {to!r}")
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"there is already something at {output}; give another output, or move it away")
    if package.head is not None and to not in _KEEP_HEAD:
        raise ValueError(f"{to} has no place for a projection head; {' and '.join(_KEEP_HEAD)} have")
    backbone = copy.deepcopy(package.backbone).cpu().eval().requires_grad_(False)
    if isinstance(backbone, VisionTransformer) and not (to == "torchhub" and package.size[0] != package.size[1]):
        backbone.set_grid(package.size)
    partial = output.with_name(f"{output.name}.partial.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        usage = FORMS[to](package._replace(backbone=backbone), partial)
        (partial / "README.md").write_text(f"{card}\n## Load it\n\n```python\n{usage.replace('FOLDER', output.name)}\n```\n")
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _write_torchhub(package: Package, folder: Path) -> str:
    """The reference's ViT has square grids, and interpolates them as ours to any other size: there is nothing to bake."""
    backbone = package.backbone
    weights = dict(backbone.state_dict())
    if isinstance(backbone, VisionTransformer):
        if backbone.grid[0] != backbone.grid[1] or backbone.norm.eps != 1e-6:
            raise ValueError(
                f"the reference's ViT has a square grid and 1e-6 as epsilon of its norms, this one {backbone.grid[0]}×{backbone.grid[1]} "
                f"and {backbone.norm.eps:g}; choose a square image_size, or safetensors, timm or onnx"
            )
        if backbone.layer_scale is None:
            weights.pop("mask_token", None)
        else:  # DINOv2's networks have one, for their training
            weights.setdefault("mask_token", torch.zeros(1, backbone.embed_dim))
    if package.head is None:
        torch.save(weights, folder / "backbone.pth")
        return _usage_of_ours(package, "FOLDER/backbone.pth") or _USAGE_OF_A_STATE_DICT
    network = _with_head(weights, package.head)
    student = {f"module.{name}": value for name, value in network.items()}
    held = {"student": student, "teacher": network, "epoch": 0}
    if package.center is not None:
        held["dino_loss"] = {"center": package.center.cpu()}
    torch.save(held, folder / "checkpoint.pth")
    return 'import torch\n\ncheckpoint = torch.load("FOLDER/checkpoint.pth")  # "student", "teacher", "dino_loss", as the reference\'s'


def _write_safetensors(package: Package, folder: Path) -> str:
    weights = dict(package.backbone.state_dict())
    if package.head is not None:
        weights = _with_head(weights, package.head)
        if package.center is not None:
            weights["loss.center"] = package.center
    metadata = {"format": "pt", "dino_lightning": json.dumps(facts_of(package.backbone))}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", metadata=metadata)
    return _usage_of_ours(package, "FOLDER") or (
        'from safetensors.torch import load_file\n\nweights = load_file("FOLDER/model.safetensors")  # for a network like the one trained'
    )


def _with_head(backbone: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": v for name, v in backbone.items()} | {f"head.{name}": v for name, v in head.items()}


def _write_torchvision(package: Package, folder: Path) -> str:
    name = type(package.backbone).__module__
    if not name.startswith("torchvision."):
        raise ValueError(f"torchvision has no {type(package.backbone).__name__}; choose one of the other forms")
    torch.save(package.backbone.state_dict(), folder / "backbone.pth")
    resnet = resnet_name(package.backbone)
    if resnet is None or package.in_chans != 3:  # torchvision builds it with a classifier, or for three channels
        return _USAGE_OF_A_STATE_DICT
    return f"""import torch
import torchvision

model = torchvision.models.{resnet}()
model.fc = torch.nn.Identity()
model.load_state_dict(torch.load("FOLDER/backbone.pth"))
images = torch.rand({package.batch})  # yours, normalised as said above
features = model.eval()(images)"""


def _usage_of_ours(package: Package, source: str) -> str | None:
    """By ``load_backbone``, if it can tell such a network by its weights."""
    options, facts = "", facts_of(package.backbone)
    if isinstance(package.backbone, SmallResNet) and source.endswith(".pth"):  # which has no place for the facts
        arguments = small_resnet_arguments(package.backbone.state_dict()) | facts
        return f'''import torch
from dino_lightning.backbones.small_resnet import SmallResNet

backbone = SmallResNet({", ".join(f"{name}={value}" for name, value in arguments.items())}).eval()
backbone.load_state_dict(torch.load("{source}"))
images = torch.rand({package.batch})  # yours, normalised as said above
features = backbone(images)'''
    if isinstance(package.backbone, VisionTransformer):
        options = f", num_heads={facts['num_heads']}"
    elif resnet_name(package.backbone) is None and not facts:
        return None
    return f'''import torch
from dino_lightning import load_backbone

backbone = load_backbone("{source}"{options})
images = torch.rand({package.batch})  # yours, normalised as said above
features = backbone(images)'''


_USAGE_OF_A_STATE_DICT = 'import torch\n\nweights = torch.load("FOLDER/backbone.pth")  # for a network like the one trained'

FORMS: dict[str, Callable[[Package, Path], str]] = {
    "torchhub": _write_torchhub,
    "timm": write_timm,
    "transformers": write_transformers,
    "torchvision": _write_torchvision,
    "safetensors": _write_safetensors,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}
_KEEP_HEAD: Sequence[str] = ("torchhub", "safetensors")
