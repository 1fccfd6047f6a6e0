"""Self-supervised learning on images with PyTorch Lightning: DINO, DINOv2, and methods to compare them with."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_lightning import evaluation
    from dino_lightning.backbones import VisionTransformer
    from dino_lightning.backbones.head import DINOHead
    from dino_lightning.cli import train
    from dino_lightning.data.datamodule import MultiCropDataModule
    from dino_lightning.losses.dino import DINOLoss
    from dino_lightning.methods.byol import BYOLModule
    from dino_lightning.methods.dino import DINOModule
    from dino_lightning.methods.dinov2 import DINOv2Module
    from dino_lightning.methods.mae import MAEModule
    from dino_lightning.methods.moco_v3 import MoCoV3Module
    from dino_lightning.methods.simclr import SimCLRModule
    from dino_lightning.weights import load_backbone

__all__ = [
    "BYOLModule",
    "DINOHead",
    "DINOLoss",
    "DINOModule",
    "DINOv2Module",
    "MAEModule",
    "MoCoV3Module",
    "MultiCropDataModule",
    "SimCLRModule",
    "VisionTransformer",
    "evaluation",
    "load_backbone",
    "train",
]

__version__ = "0.1.0"

# Imported when they are asked for: torch and Lightning take seconds, which the command line has not got to name a misspelt option.
_HOME = {
    "BYOLModule": "methods.byol",
    "DINOHead": "backbones.head",
    "DINOLoss": "losses.dino",
    "DINOModule": "methods.dino",
    "DINOv2Module": "methods.dinov2",
    "MAEModule": "methods.mae",
    "MoCoV3Module": "methods.moco_v3",
    "SimCLRModule": "methods.simclr",
    "MultiCropDataModule": "data.datamodule",
    "VisionTransformer": "backbones",
    "load_backbone": "weights",
    "train": "cli",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    return globals().setdefault(name, getattr(module, name) if name in _HOME else module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
