"""torchvision's classification CNNs as backbones: pooled features instead of class scores."""

import inspect

import torchvision
from torch import nn
from torchvision.models import get_model_builder, list_models

from dino_lightning.backbones.features import first_convolution

# No CNNs, and most take one input size only; our own and timm's take any.
_TRANSFORMERS = ("vit_", "swin_", "maxvit")


def cnn_names() -> list[str]:
    """Names of the classification CNNs in torchvision."""
    return [name for name in list_models(module=torchvision.models) if not name.startswith(_TRANSFORMERS)]


def torchvision_cnn(name: str, in_chans: int, drop_path_rate: float) -> nn.Module:
    """An untrained CNN that maps images (B, in_chans, H, W) to its pooled features (B, D).

    ``drop_path_rate`` reaches the families with stochastic depth (EfficientNet, ConvNeXt).
    """
    builder = get_model_builder(name)
    family = inspect.signature(inspect.signature(builder).return_annotation).parameters
    options = {}
    if "stochastic_depth_prob" in family:
        options["stochastic_depth_prob"] = drop_path_rate
    if "aux_logits" in family:  # GoogLeNet, Inception: auxiliary classifiers would be parameters without a gradient
        options |= {"aux_logits": False, "init_weights": True}
    model = builder(weights=None, **options)
    _drop_classifier(model)
    if in_chans != 3:
        _adapt_first_convolution(model, in_chans)
    return model


def _drop_classifier(model: nn.Module) -> None:
    if hasattr(model, "fc"):  # ResNet, RegNet, ShuffleNet, GoogLeNet, Inception
        model.fc = nn.Identity()
        return
    if isinstance(getattr(model, "avgpool", None), nn.AdaptiveAvgPool2d):
        model.avgpool = nn.AdaptiveAvgPool2d(1)  # VGG and AlexNet pool to a grid of 7 × 7 or 6 × 6 for their classifier
    if isinstance(model.classifier, nn.Linear):  # DenseNet
        model.classifier = nn.Identity()
        return
    layers = list(model.classifier)
    if any(isinstance(layer, nn.Conv2d) for layer in layers):  # SqueezeNet classifies before it pools
        model.classifier = nn.AdaptiveAvgPool2d(1)
        return
    # ConvNeXt normalises and flattens first; that stays. From the first dropout or linear layer on it is classification.
    classifies = [isinstance(layer, (nn.Dropout, nn.Linear)) for layer in layers]
    model.classifier = nn.Sequential(*layers[: classifies.index(True)])


def _adapt_first_convolution(model: nn.Module, in_chans: int) -> None:
    name, first = first_convolution(model)
    parent, _, attribute = name.rpartition(".")
    convolution = nn.Conv2d(
        in_chans,
        first.out_channels,
        first.kernel_size,
        stride=first.stride,
        padding=first.padding,
        bias=first.bias is not None,
    )
    setattr(model.get_submodule(parent), attribute, convolution)
