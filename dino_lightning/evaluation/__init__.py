"""What the features are worth: functions of features and labels, without a Trainer."""

from dino_lightning.evaluation.knn import knn_accuracy

__all__ = ["knn_accuracy"]
