"""Generated scenes for demonstrations: an object on clutter, with its class and its mask, a function of the index alone."""

import colorsys

import numpy as np
from torch.utils.data import Dataset

from dino_lightning.randomness import generator

_HUES, _TEXTURES = 8, 2


class Scenes(Dataset):
    """Scene i is (image uint8 (side, side, 3), class); ``mask(i)`` is where its object is.

    The object is a blob at a random place, in one of eight hues and one of two textures: sixteen classes. The clutter is gray
    and says nothing about the class, and each scene has a light of its own, so neither pixels nor an untrained network
    tell the classes apart well.

    Args:
        count: number of scenes.
        first: index of the first, so that training and query scenes can differ.
        side: pixels.
    """

    n_classes = _HUES * _TEXTURES

    def __init__(self, count: int, first: int = 0, side: int = 64) -> None:
        self.count, self.first, self.side = count, first, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, _, label = self._draw(index)
        return image, label

    def mask(self, index: int) -> np.ndarray:
        """bool (side, side): the object's pixels."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        random = generator(self.first + index, _HUES)
        label = int(random.integers(self.n_classes))
        mask = _blob(self.side, random)
        image = np.where(mask[..., None], _surface(self.side, label, random), _clutter(self.side, random))
        light = random.uniform(0.55, 1.25)
        noise = random.normal(0, 8, image.shape)
        return (image * light + noise).clip(0, 255).astype(np.uint8), mask, label


def _blob(side: int, random: np.random.Generator) -> np.ndarray:
    """A wobbly disc of 12 to 30 % of the area, wholly inside: bool (side, side)."""
    y, x = np.mgrid[0:side, 0:side]
    radius = side * np.sqrt(random.uniform(0.12, 0.30) / np.pi)
    row, column = random.uniform(radius, side - radius, 2)
    angle = np.arctan2(y - row, x - column)
    wobble = sum(random.uniform(-0.1, 0.1) * np.sin(k * angle + random.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    return np.hypot(y - row, x - column) < radius * (1 + wobble)


def _surface(side: int, label: int, random: np.random.Generator) -> np.ndarray:
    """Colour of the class in every pixel (side, side, 3): stripes or checks of its hue."""
    hue, texture = divmod(label, _TEXTURES)
    color = 255 * np.array(colorsys.hsv_to_rgb(hue / _HUES, random.uniform(0.6, 1.0), random.uniform(0.75, 1.0)))
    y, x = np.mgrid[0:side, 0:side]
    turn, phase = random.uniform(0, np.pi, 2)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave = np.sin(u * 1.3 + phase) if texture else np.sin(u * 0.7 + phase) * np.sin(v * 0.7)
    return color * (0.7 + 0.3 * np.sign(wave))[..., None]


def _clutter(side: int, random: np.random.Generator) -> np.ndarray:
    """Gray rectangles over each other: (side, side, 1)."""
    ground = np.full((side, side, 1), random.uniform(60, 190))
    for _ in range(25):
        top, left = random.integers(-side // 4, side, 2)
        height, width = random.integers(side // 16, side // 3, 2)
        ground[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = random.uniform(20, 235)
    return ground
