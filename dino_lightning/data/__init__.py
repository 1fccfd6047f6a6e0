"""Images from files and folders, and generated ones."""

from dino_lightning.data.decode import ChannelMismatch, UnreadableImage, as_array, read_image
from dino_lightning.data.hugging_face import HuggingFaceImages
from dino_lightning.data.image_files import ImageFiles
from dino_lightning.data.image_folder import ImageFolder
from dino_lightning.data.roots import find_splits, open_images
from dino_lightning.data.scenes import Scenes
from dino_lightning.data.shards import Shards
from dino_lightning.data.tars import Tars
from dino_lightning.listing import IMAGE_EXTENSIONS

__all__ = [
    "IMAGE_EXTENSIONS",
    "ChannelMismatch",
    "HuggingFaceImages",
    "ImageFiles",
    "ImageFolder",
    "Scenes",
    "Shards",
    "Tars",
    "UnreadableImage",
    "as_array",
    "find_splits",
    "open_images",
    "read_image",
]
