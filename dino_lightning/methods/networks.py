"""Student and teacher: a backbone and its heads, and what follows them."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lightning.backbones.features import eagerly, evaluating
from dino_lightning.training.sharding import local


class Network(nn.Module):
    """A backbone and a head. State-dict keys are ``backbone.*`` and ``head.*``, as in the reference's checkpoints.

    A method with other heads names them: ``Network(backbone, dino_head=..., ibot_head=...)``.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module | None = None, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, part in {**({"head": head} if head is not None else {}), **heads}.items():
            self.add_module(name, part)

    def compile(self, *, dynamic: bool | None = False, **options: Any) -> None:
        """Compiles the backbone in place, where nearly all kernels are launched; ``state_dict`` keys stay. Evaluation is not compiled.

        Args:
            dynamic: whether one compiled form is to serve several shapes. Views come in two sizes only: each has its own.
            options: others of ``torch.compile``.
        """
        self.backbone.compile(dynamic=dynamic, **options)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """V views (B, C, H, W), of any sizes in any order → logits (V·B, K), views-major; the head is called once on everything."""
        return self.head(self.embed(views))

    def embed(self, views: Sequence[Tensor]) -> Tensor:
        """V views → features (V·B, D), views-major. All views of one size share one call of the backbone."""
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, view in enumerate(views):
            by_size[tuple(view.shape[-2:])].append(i)
        features: list[Tensor] = [torch.empty(0)] * len(views)
        for indices in by_size.values():
            together = self.backbone(torch.cat([views[i] for i in indices]))
            for i, part in zip(indices, together.chunk(len(indices))):
                features[i] = part
        return torch.cat(features)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → features (B, D), with the batch norms' running statistics."""
        with evaluating(batch_norms(self.backbone)), eagerly():  # its batches have other shapes, each of which would be compiled
            return self.backbone(images)


class Teacher(Network):
    """The exponential moving average of a student: a frozen copy without stochastic depth and dropout, and without the parts named.

    Only its batch norms are in training mode, whatever ``train()`` or ``eval()`` says: they normalise by the batch and keep
    running statistics of their own, as in the reference.
    """

    def __init__(self, student: Network, without: Sequence[str] = ()) -> None:
        super().__init__(**{name: copy.deepcopy(part) for name, part in student.named_children() if name not in without})
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        super().train(False)
        for norm in batch_norms(self):
            norm.train(True)
        return self

    @torch.no_grad()
    def follow(self, student: Network, momentum: float) -> None:
        """θ_t ← m·θ_t + (1 − m)·θ_s for all parameters; buffers stay the teacher's own."""
        parts = [(part, getattr(student, name)) for name, part in self.named_children()]
        own, others = (list(itertools.chain.from_iterable(part.parameters() for part in of)) for of in zip(*parts))
        torch._foreach_lerp_(local(own), local(others), 1 - momentum)


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Its batch norms of any kind, synchronised ones too."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]
