"""Weights in and out: what others trained, and what others take."""

from dino_lightning.weights.load import load_backbone
from dino_lightning.weights.published import PUBLISHED

__all__ = ["PUBLISHED", "load_backbone"]
