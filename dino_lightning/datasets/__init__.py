"""Images from files and folders, and generated ones."""

from dino_lightning.datasets.decode import ChannelMismatch, UnreadableImage, as_array, read_image
from dino_lightning.datasets.image_files import ImageFiles
from dino_lightning.datasets.image_folder import IMAGE_EXTENSIONS, ImageFolder, find_splits
from dino_lightning.datasets.scenes import Scenes

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
