"""Masks as the tools read them: images whose numbers say what a pixel is."""

import os

import numpy as np
from PIL import Image

from dino_lightning.data import UnreadableImage


def read_mask(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """The numbers (H, W) of an image of one channel; of one with a palette those of its entries, as VOC and DAVIS have them.

    Raises:
        UnreadableImage: if it cannot be read.
        ValueError: if it has colours, numbers above 255, or another ``size`` (H, W) than its image.
    """
    try:
        with Image.open(path) as image:
            numbers = np.array(image)
    except (OSError, SyntaxError) as error:
        raise UnreadableImage(str(path), str(error)) from error
    if numbers.ndim != 2:
        raise ValueError(f"the mask {path} has colours or transparency; save it with one channel, 0 where nothing is")
    if size is not None and numbers.shape != size:
        raise ValueError(f"the mask {path} has {numbers.shape[0]}×{numbers.shape[1]} pixels, but its image {size[0]}×{size[1]}")
    if numbers.max(initial=0) > 255:
        raise ValueError(f"the mask {path} has numbers up to {numbers.max()}; save it with 8 bits")
    return numbers.astype(np.uint8)
