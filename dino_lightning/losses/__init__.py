"""Objectives: modules and functions of tensors."""

from dino_lightning.losses.byol import BYOLLoss
from dino_lightning.losses.centering import Centering
from dino_lightning.losses.dino import DINOLoss, dino_terms
from dino_lightning.losses.ibot import IBOTLoss
from dino_lightning.losses.info_nce import InfoNCELoss
from dino_lightning.losses.koleo import KoLeoLoss
from dino_lightning.losses.masked_pixels import MaskedPixelsLoss
from dino_lightning.losses.nt_xent import NTXentLoss
from dino_lightning.losses.sinkhorn import sinkhorn_knopp

__all__ = [
    "BYOLLoss",
    "Centering",
    "DINOLoss",
    "IBOTLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "MaskedPixelsLoss",
    "NTXentLoss",
    "dino_terms",
    "sinkhorn_knopp",
]
