"""The commands beside fit: functions whose arguments are the command line's, called on checkpoints and features."""

from dino_lightning.tools.adopt import adopt
from dino_lightning.tools.attention import attention
from dino_lightning.tools.clusters import clusters
from dino_lightning.tools.compare import compare
from dino_lightning.tools.copies import copies
from dino_lightning.tools.duplicates import duplicates
from dino_lightning.tools.estimate import estimate
from dino_lightning.tools.evaluate import evaluate
from dino_lightning.tools.export import export
from dino_lightning.tools.extract import extract
from dino_lightning.tools.finetune import finetune
from dino_lightning.tools.knn import knn
from dino_lightning.tools.linear import linear
from dino_lightning.tools.neighbors import neighbors
from dino_lightning.tools.retrieval import retrieval
from dino_lightning.tools.segment import segment
from dino_lightning.tools.shard import shard
from dino_lightning.tools.shrink import shrink
from dino_lightning.tools.track import track
from dino_lightning.tools.video import video

TOOLS = {
    "adopt": adopt,
    "attention": attention,
    "clusters": clusters,
    "duplicates": duplicates,
    "compare": compare,
    "copies": copies,
    "estimate": estimate,
    "evaluate": evaluate,
    "export": export,
    "extract": extract,
    "finetune": finetune,
    "knn": knn,
    "linear": linear,
    "neighbors": neighbors,
    "retrieval": retrieval,
    "segment": segment,
    "shard": shard,
    "shrink": shrink,
    "track": track,
    "video": video,
}
