"""What a backbone makes of images, found by trying."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from dino_lightning.backbones.positions import height_width
from dino_lightning.backbones.vit import VisionTransformer

log = logging.getLogger(__name__)


def example_images(backbone: nn.Module, img_size: int | tuple[int, int], in_chans: int) -> torch.Tensor:
    """One black image (1, C, H, W) that the backbone takes: of its own size and channels where it tells them.

    Raises:
        ValueError: if it takes neither ``img_size`` nor a usual size.
    """
    weight = next(iter(backbone.parameters()), torch.empty(0))
    sizes = [height_width(img_size)]
    if isinstance(backbone, VisionTransformer):
        sizes = [tuple(side * backbone.patch_size for side in backbone.grid)]
    _, convolution = first_convolution(backbone)
    channels = convolution.in_channels if convolution is not None else in_chans
    failure = None
    for size in dict.fromkeys([*sizes, (224, 224), (96, 96), (64, 64), (32, 32)]):
        images = torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype)
        try:
            with torch.no_grad():
                features_at(backbone, images)
            return images
        except ValueError as error:
            failure = failure or error
    raise failure


def feature_dim(backbone: nn.Module, images: torch.Tensor) -> int:
    """Width D of the features, found by a forward pass of ``images`` (B, C, H, W)."""
    with torch.no_grad():
        return features_at(backbone, images).shape[1]


def freeze_unused(backbone: nn.Module, images: torch.Tensor, used: Collection[str] = ()) -> None:
    """Freezes the parameters that play no part in the features (a mask token, a forgotten classifier), and says so.

    Trainable parameters without a gradient stop distributed training with an error that does not name them. Those that are
    ``used`` otherwise stay as they are.
    """
    if isinstance(backbone, VisionTransformer) and backbone.mask_token is None:  # all of it plays a part
        return
    with torch.enable_grad():
        features = features_at(backbone, images)
        trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(features.sum(), trainable.values(), allow_unused=True) if trainable else ()
    unused = [name for name, gradient in zip(trainable, gradients) if gradient is None and name not in used]
    for name in unused:
        trainable[name].requires_grad_(False)
    if unused:
        log.warning("frozen, because the features do not depend on them: %s", ", ".join(unused))


def features_at(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of ``images`` (B, C, H, W) with the backbone in evaluation mode, its modes restored afterwards.

    Raises:
        ValueError: if the backbone fails on them, saying what is wrong (channels, dtype, else the size) and the remedy, or if it
            gives something else than (B, D).
    """
    try:
        with evaluating(backbone.modules()), eagerly():  # a shape that is not met again
            features = backbone(images)
    except Exception as error:
        raise ValueError(_fault(backbone, images, error)) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"the backbone {type(backbone).__name__} must map images {tuple(images.shape)} to features (B, D), got {got}; "
            "pool and flatten its output"
        )
    return features


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, each of these modules is by itself in evaluation mode, a teacher's batch norms too; afterwards in its own mode again."""
    modes = {module: module.training for module in modules}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def eagerly() -> AbstractContextManager:
    """Within it, what was compiled in place runs as it was before: for shapes that are not worth a compilation of their own."""
    return nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")


def first_convolution(backbone: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The first 2-D convolution and its name; its ``in_channels`` are in most networks those of the images. ("", None) without one."""
    return next(((name, part) for name, part in backbone.named_modules() if isinstance(part, nn.Conv2d)), ("", None))


def _fault(backbone: nn.Module, images: torch.Tensor, error: Exception) -> str:
    """What is wrong with images on which the backbone fails, and the remedy."""
    name, channels = type(backbone).__name__, images.shape[1]
    _, convolution = first_convolution(backbone)
    if convolution is not None and convolution.in_channels != channels:
        return (
            f"the images have {channels} channels, the backbone takes {convolution.in_channels}; set in_chans, of the module or of "
            f"the data ({name})"
        )
    weight = next((parameter for parameter in backbone.parameters() if parameter.is_floating_point()), None)
    if weight is not None and weight.dtype != images.dtype:
        return f"the images are {images.dtype}, the weights of the backbone {weight.dtype}; have the loader give {weight.dtype} ({name})"
    return (
        f"the backbone {name} cannot take {images.shape[-2]}×{images.shape[-1]} images: {error}. "
        "Choose crop sizes (and img_size) that it takes, or a backbone that takes any size"
    )
