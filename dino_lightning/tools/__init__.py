"""The commands beside fit: functions whose arguments are the command line's, called on checkpoints."""

from dino_lightning.tools.attention import attention
from dino_lightning.tools.finetune import finetune
from dino_lightning.tools.knn import knn
from dino_lightning.tools.linear import linear

TOOLS = {"attention": attention, "finetune": finetune, "knn": knn, "linear": linear}
