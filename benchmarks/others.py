"""The training steps of others, built from their own code: the reference (a checkout of facebookresearch/dino) and lightly.

Each is a ``Step``: its networks, its loss and what it does after the backward pass, as its own training loop or example has it.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Step(NamedTuple):
    """``forward`` gives the loss of a list of views; ``update`` is all that follows the backward pass; ``student`` has the gradients."""

    student: nn.Module
    teacher: nn.Module
    loss: nn.Module
    forward: Callable[[Sequence[Tensor]], Tensor]
    update: Callable[[], None]


def reference(path: Path, arch: str, k: int, drop_path: float, n_views: int, device: torch.device) -> Step:
    """Of the reference: multi-crop wrapper, loss with its centre, clipping of each parameter, AdamW, moving average."""
    modules = import_reference(path)
    vits, utils, DINOLoss = modules["vision_transformer"], modules["utils"], modules["main_dino"].DINOLoss
    single_process_group()

    def network(rate: float) -> nn.Module:
        backbone = getattr(vits, arch)(patch_size=16, drop_path_rate=rate)
        return utils.MultiCropWrapper(backbone, vits.DINOHead(backbone.embed_dim, k, False)).to(device)

    student, teacher = network(drop_path), network(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss = DINOLoss(k, n_views, 0.04, 0.04, 0, 100).to(device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student), lr=1e-4)

    def update() -> None:
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(1, student, 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for own, other in zip(student.parameters(), teacher.parameters()):
                other.data.mul_(0.996).add_((1 - 0.996) * own.detach().data)

    return Step(student, teacher, loss, lambda views: loss(student(views), teacher(views[:2]), 0), update)


def single_process_group() -> None:
    """Of this process alone: the reference's loss reduces its centre over ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)


def import_reference(path: Path) -> dict:
    """Its modules, which are named like everybody's."""
    if not (path / "main_dino.py").exists():
        raise SystemExit(f"{path} is not a checkout of facebookresearch/dino: there is no main_dino.py")
    sys.path.insert(0, os.fspath(path))
    try:
        import main_dino
        import utils
        import vision_transformer
    finally:
        sys.path.remove(os.fspath(path))
    return {"main_dino": main_dino, "utils": utils, "vision_transformer": vision_transformer}


def lightly(arch: str, k: int, drop_path: float, device: torch.device) -> Step:
    """Of lightly's own example: one forward pass for each view, its loss, its cancelled last layer, its moving average."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from timm.models.vision_transformer import VisionTransformer

    width, heads = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}[arch]

    def network(rate: float) -> nn.Module:
        backbone = VisionTransformer(embed_dim=width, num_heads=heads, num_classes=0, dynamic_img_size=True, drop_path_rate=rate)
        return nn.Sequential(backbone, DINOProjectionHead(width, 2048, 256, k, freeze_last_layer=1)).to(device)

    student, teacher = network(drop_path), network(0.0)
    deactivate_requires_grad(teacher)
    loss = DINOLoss(output_dim=k, warmup_teacher_temp_epochs=5).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        student[1].cancel_last_layer_gradients(current_epoch=1)
        optimizer.step()
        optimizer.zero_grad()
        update_momentum(student, teacher, m=0.996)

    def forward(views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        return loss(targets, [student(view) for view in views], epoch=5)

    return Step(student, teacher, loss, forward, update)
