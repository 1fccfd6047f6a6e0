"""Callbacks: what happens around training steps."""

from dino_lightning.callbacks.feature_writer import FeatureWriter
from dino_lightning.callbacks.online_knn import OnlineKNN
from dino_lightning.callbacks.progress import ProgressBar
from dino_lightning.callbacks.run_config import RunConfig

__all__ = ["FeatureWriter", "OnlineKNN", "ProgressBar", "RunConfig"]
