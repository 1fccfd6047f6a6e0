"""The commands beside fit: functions whose arguments are the command line's, called on checkpoints."""

from dino_lightning.tools.attention import attention
from dino_lightning.tools.knn import knn
from dino_lightning.tools.video import video

TOOLS = {"attention": attention, "knn": knn, "video": video}
