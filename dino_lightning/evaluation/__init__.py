"""What the features are worth: functions of features and labels, without a Trainer."""

from dino_lightning.evaluation.knn import knn_accuracy
from dino_lightning.evaluation.linear import linear_protocol, probe_features

__all__ = ["knn_accuracy", "linear_protocol", "probe_features"]
