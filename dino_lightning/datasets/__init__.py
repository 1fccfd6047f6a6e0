"""Images from files and folders."""

from dino_lightning.datasets.decode import ChannelMismatch, UnreadableImage, as_array, read_image
from dino_lightning.datasets.image_folder import IMAGE_EXTENSIONS, ImageFolder, find_splits

__all__ = [
    "IMAGE_EXTENSIONS",
    "ChannelMismatch",
    "ImageFolder",
    "UnreadableImage",
    "as_array",
    "find_splits",
    "read_image",
]
