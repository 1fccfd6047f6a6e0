"""Images from files and folders, and generated ones."""

from dino_lightning.data.decode import ChannelMismatch, UnreadableImage, as_array, read_image
from dino_lightning.data.image_files import ImageFiles
from dino_lightning.data.image_folder import ImageFolder, find_splits
from dino_lightning.data.scenes import Scenes
from dino_lightning.listing import IMAGE_EXTENSIONS

__all__ = [
    "IMAGE_EXTENSIONS",
    "ChannelMismatch",
    "ImageFiles",
    "ImageFolder",
    "Scenes",
    "UnreadableImage",
    "as_array",
    "find_splits",
    "read_image",
]
