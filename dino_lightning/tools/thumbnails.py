"""What the sheets of found images are made of: small pictures with their names, as the network saw them."""

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch

from dino_lightning.data import UnreadableImage, read_image
from dino_lightning.data.geometry import center_view
from dino_lightning.pictures import captioned, rgb

log = logging.getLogger(__name__)

_SIDE = 160  # pixels of the longer side


class Thumbnails:
    """Draws centre views of the shape (H, W) that the features are of.

    Args:
        size: (H, W), of which the shape counts.
        in_chans: channels of the images.
        lines: of text below each.
    """

    def __init__(self, size: Sequence[int], in_chans: int, lines: int) -> None:
        self.size = tuple(round(_SIDE * side / max(size)) for side in size)
        self.in_chans, self.lines = in_chans, lines

    def draw(self, path: str, caption: str) -> np.ndarray:
        """Colours (h, w, 3) of uint8; an image that cannot be read any more is gray, and named in the log."""
        try:
            view = center_view(read_image(path, self.in_chans), self.size)
        except UnreadableImage as error:
            log.warning("not drawn: %s", error)
            view, caption = torch.full((3, *self.size), 220, dtype=torch.uint8), f"cannot be read: {caption}"
        return captioned(rgb(view), caption, self.lines)

    def cell(self) -> tuple[int, int]:
        """(height, width) of what ``draw`` gives."""
        height, width = captioned(np.zeros((*self.size, 3), dtype=np.uint8), "", self.lines).shape[:2]
        return height, width


class ShortNames:
    """Names for captions: the folder below the deepest one that all paths lie in, if any, and in the next line the file."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.folder = os.path.commonpath([os.path.dirname(path) for path in paths])

    def __call__(self, path: str) -> str:
        folder, name = os.path.split(os.path.relpath(path, self.folder))
        return f"{folder}/\n{name}" if folder else name
