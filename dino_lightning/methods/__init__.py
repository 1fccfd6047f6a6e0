"""Pre-training methods, one a file."""

import importlib

# Name, which is that of its file, and class. Nothing is imported before it is asked for.
METHODS = {
    "dino": "DINOModule",
    "dinov2": "DINOv2Module",
    "simclr": "SimCLRModule",
    "byol": "BYOLModule",
    "moco_v3": "MoCoV3Module",
    "mae": "MAEModule",
}


def home(name: str) -> tuple[str, str]:
    """The module and the class of a method.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return f"{__name__}.{name}", METHODS[name]


def method_class(name: str) -> type:
    """The LightningModule of a method, by its name."""
    module, owner = home(name)
    return getattr(importlib.import_module(module), owner)
