"""The commands beside fit: functions whose arguments are the command line's, called on checkpoints."""

from dino_lightning.tools.attention import attention
from dino_lightning.tools.knn import knn

TOOLS = {"attention": attention, "knn": knn}
