"""Callbacks: what happens around training steps."""

from dino_lightning.callbacks.attention_maps import AttentionMaps
from dino_lightning.callbacks.doctor import CollapseDoctor
from dino_lightning.callbacks.feature_writer import FeatureWriter
from dino_lightning.callbacks.online_knn import OnlineKNN
from dino_lightning.callbacks.online_probe import OnlineProbe
from dino_lightning.callbacks.progress import ProgressBar
from dino_lightning.callbacks.run_config import RunConfig
from dino_lightning.callbacks.run_report import RunReport
from dino_lightning.callbacks.save_every import SaveEvery
from dino_lightning.callbacks.scene_report import SceneReport
from dino_lightning.callbacks.stop_on_signal import StopOnSignal
from dino_lightning.callbacks.throughput import Throughput

__all__ = [
    "AttentionMaps",
    "CollapseDoctor",
    "FeatureWriter",
    "OnlineKNN",
    "OnlineProbe",
    "ProgressBar",
    "RunConfig",
    "RunReport",
    "SaveEvery",
    "SceneReport",
    "StopOnSignal",
    "Throughput",
]
