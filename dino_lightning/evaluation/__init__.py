"""What the features are worth: functions of features and labels, without a Trainer."""

from dino_lightning.evaluation.knn import knn_accuracy
from dino_lightning.evaluation.neighbors import near_duplicates, nearest

__all__ = ["knn_accuracy", "near_duplicates", "nearest"]
