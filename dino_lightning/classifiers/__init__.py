"""Classifiers with labels, on features or a trained backbone."""

from dino_lightning.classifiers.finetune import FineTune
from dino_lightning.classifiers.probe import LinearProbe

__all__ = ["FineTune", "LinearProbe"]
