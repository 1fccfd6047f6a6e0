"""What the features are worth: functions of features and labels, without a Trainer."""

from dino_lightning.evaluation.feature_metrics import FeatureMetrics
from dino_lightning.evaluation.knn import knn_accuracy
from dino_lightning.evaluation.linear import linear_protocol, probe_features
from dino_lightning.evaluation.neighbors import near_duplicates, nearest

__all__ = ["FeatureMetrics", "knn_accuracy", "linear_protocol", "near_duplicates", "nearest", "probe_features"]
