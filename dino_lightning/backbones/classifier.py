"""Networks of torchvision and timm that still end in their classifier, whose class scores are poor features."""

import logging
import re

import torch
from torch import nn

from dino_lightning.backbones.features import features_at

log = logging.getLogger(__name__)

_LIBRARIES = ("torchvision.models", "timm.models")


def warn_of_classifier(backbone: nn.Module, images: torch.Tensor) -> None:
    """Says so if the features of ``images`` (B, C, H, W) are class scores, which layer gives them, and how to take it off.

    A last layer is a classifier if it stands in a network of torchvision or timm and its width is no multiple of 32. Classes
    hardly ever are one (1000, 21843, 100, 10); a projection is (128, 512), and may end any network.
    """
    owned = _layers_of_libraries(backbone)
    if not owned:
        return
    last, features = _last_layer(backbone, images)
    width = features.shape[1]
    if last not in owned or width % 32 == 0 or width != getattr(last, "out_features", getattr(last, "out_channels", None)):
        return
    name = next(name for name, module in backbone.named_modules() if module is last)
    log.warning(
        "the backbone ends in its classifier: the features would be the %d class scores of its layer %s. Take it off, "
        "%s = torch.nn.Identity() (timm: create it with num_classes=0), or give the backbone by name, as 'resnet18' or 'timm/NAME'",
        *(width, name, re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"backbone.{name}")),
    )


def _layers_of_libraries(backbone: nn.Module) -> set[nn.Module]:
    networks = [m for m in backbone.modules() if any(base.__module__.startswith(_LIBRARIES) for base in type(m).__mro__)]
    return {layer for network in networks for layer in network.modules()}


def _last_layer(backbone: nn.Module, images: torch.Tensor) -> tuple[nn.Module | None, torch.Tensor]:
    """The last one with weights that the images go through, and the features (B, D)."""
    seen: list[nn.Module] = []
    layers = [module for module in backbone.modules() if not list(module.children()) and list(module.parameters())]
    hooks = [layer.register_forward_hook(lambda layer, *_: seen.append(layer)) for layer in layers]
    try:
        with torch.no_grad():
            features = features_at(backbone, images)
    finally:
        for hook in hooks:
            hook.remove()
    return (seen[-1] if seen else None), features
