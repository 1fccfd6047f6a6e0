"""Optimizers: parameter groups of DINO and DINOv2, clipping without host syncs, and LARS."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_lightning.training.sharding import local, norms_of_all


def param_groups(module: nn.Module, weight_decay: float | None = None) -> list[dict]:
    """Splits the trainable parameters of ``module`` into [decayed, undecayed], the first with this weight decay where it is given.

    Biases and all one-dimensional tensors (norms) are not decayed. As in the reference, everything else is, which includes
    the class token, the positions and the prototypes; frozen parameters are left out.
    """
    decayed, undecayed = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else undecayed).append(parameter)
    rate = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [{"params": decayed, **rate}, {"params": undecayed, "weight_decay": 0.0}]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: not to biases and one-dimensional tensors."""
    return not name.endswith(".bias") and parameter.ndim != 1


class Layered(NamedTuple):
    """Where a parameter stands in DINOv2's network: in the ``backbone``, with so many layers ``below`` the output that their decay counts,
    in the ``patch_embed``, ``decayed`` or not, in a head's ``last_layer``.
    """

    backbone: bool
    below: int
    patch_embed: bool
    decayed: bool
    last_layer: bool

    def lr_multiplier(self, layerwise_decay: float, patch_embed_lr_mult: float) -> float:
        """The factor of its learning rate, which falls from block to block towards the input."""
        return layerwise_decay**self.below * (patch_embed_lr_mult if self.patch_embed else 1.0)


def layered(name: str, parameter: Tensor, depth: int | None) -> Layered:
    """The place of a parameter by its name in a network of ``backbone.*`` and heads.

    The final norm and the heads have all of the learning rate. Biases, norms, LayerScale and all that has one dimension are not
    decayed. Chunks before the number of a block (``blocks.CHUNK.N.``) change nothing.

    Args:
        name: of the parameter.
        parameter: its dimensions count.
        depth: blocks of the backbone if it is a ViT; else all its layers are alike.

    Raises:
        ValueError: for a block beyond ``depth``.
    """
    block = re.match(r"backbone\.blocks\.(?:\d+\.)?(\d+)\.", name)
    below = 0
    if depth is not None and block:
        below = depth - int(block[1])
        if below < 1:
            raise ValueError(f"{name} is beyond the depth {depth}; give the depth of this network")
    elif depth is not None and name.startswith(_EMBEDDINGS):
        below = depth + 1
    backbone = name.startswith("backbone.")
    patch_embed = name.startswith("backbone.patch_embed.")
    decayed = is_decayed(name, parameter) and "norm" not in name and "gamma" not in name
    return Layered(backbone, below, patch_embed, decayed, not backbone and ".last_layer." in name)


_EMBEDDINGS = tuple(f"backbone.{part}" for part in ("patch_embed.", "pos_embed", "cls_token", "register_tokens", "mask_token"))


def layered_param_groups(module: nn.Module, depth: int | None) -> list[dict]:
    """The trainable parameters of ``module`` (``backbone.*``, and heads), those together that stand alike (``layered``).

    Each group has ``params`` and, for a schedule to set its learning rate and decay by, the fields of its ``Layered``. The groups depend
    on the network alone, whatever the rates, and are in ascending order of these fields.
    """
    groups: dict[Layered, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(layered(name, parameter, depth), []).append(parameter)
    return [{"params": groups[place], **place._asdict()} for place in sorted(groups)]


def build_optimizer(name: str, groups: list[dict], *, fused: bool) -> torch.optim.Optimizer:
    """AdamW, SGD (momentum 0.9) or LARS over parameter groups.

    The learning rate is 0 until the schedule sets it, so that a step without a schedule moves nothing. ``fused`` must be off
    under a gradient scaler: a fused optimizer unscales inside its step, after the clipping.

    Raises:
        ValueError: for any other name.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=fused)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)
        for group in optimizer.param_groups:  # torch's fused step takes all momenta or none, and prototypes are frozen at first
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name == "lars":
        return LARS(groups, lr=0.0)
    raise ValueError(f"optimizer must be 'adamw', 'sgd' or 'lars', got {name!r}")


@torch.no_grad()
def gradient_norms(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients that are there (of sharded ones this rank's shards), and the L2 norm of each whole one as a scalar on its device."""
    whole = [p.grad for p in parameters if p.grad is not None]
    gradients = local(whole)
    return gradients, norms_of_all(whole, torch._foreach_norm(gradients)) if gradients else []


@torch.no_grad()
def clip_each_(gradients: Sequence[Tensor], norms: Sequence[Tensor], max_norm: float) -> None:
    """Scales every gradient whose own norm exceeds ``max_norm`` down to it, in place.

    This is the clipping of the reference: per tensor, not by the global norm. Nothing is read back to the host.
    """
    factors = torch._foreach_div(torch._foreach_add(norms, 1e-6), max_norm)
    torch._foreach_reciprocal_(factors)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


@torch.no_grad()
def clip_together_(gradients: Sequence[Tensor], norms: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients by one factor, in place, so that their common norm is at most ``max_norm``; returns that norm as it was.

    This is the clipping of DINOv2, for each of its backbone and heads. Nothing is read back to the host.
    """
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    torch._foreach_mul_(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by the trust ratio eta·‖w‖/‖g‖ (You et al. 2017, equation 6).

    Weight decay and the trust ratio leave one-dimensional tensors alone, as in the reference.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: nn.Parameter, group: dict) -> None:
        update = parameter.grad
        if parameter.ndim != 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            weight_norm, update_norm = parameter.norm(), update.norm()
            trust = group["eta"] * weight_norm / update_norm
            update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, 1.0)
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        momentum.mul_(group["momentum"]).add_(update)
        parameter.add_(momentum, alpha=-group["lr"])
