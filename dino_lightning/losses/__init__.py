"""Objectives: modules and functions of tensors."""

from dino_lightning.losses.centering import Centering
from dino_lightning.losses.dino import DINOLoss, dino_terms
from dino_lightning.losses.ibot import IBOTLoss
from dino_lightning.losses.koleo import KoLeoLoss
from dino_lightning.losses.sinkhorn import sinkhorn_knopp

__all__ = ["Centering", "DINOLoss", "IBOTLoss", "KoLeoLoss", "dino_terms", "sinkhorn_knopp"]
