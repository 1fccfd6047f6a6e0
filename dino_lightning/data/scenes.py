"""Generated scenes for demonstrations: an object on clutter, with its class and its mask, a function of the index alone."""

import colorsys

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino_lightning.training.randomness import generator

_HUES = 16


class Scenes(Dataset):
    """Scene i is (image uint8 (side, side, 3), class); ``mask(i)`` is where its object is.

    The object is a striped or chequered blob at a random place; its class is which of sixteen hues it has. What surrounds it
    says nothing about the class: rectangles in weak colours of their own, under a light of the scene's own, bright or dim.
    So neither small images compared pixel by pixel nor an untrained network tell the classes well. (Statistics of the
    strongest colours would; the point is that DINO finds out by itself what to look at.)

    Args:
        count: number of scenes.
        first: index of the first, so that training and query scenes can differ.
        side: pixels.
    """

    n_classes = _HUES

    def __init__(self, count: int, first: int = 0, side: int = 64) -> None:
        if count < 1 or first < 0 or side < 16:
            raise ValueError(f"count ≥ 1, first ≥ 0 and side ≥ 16 are needed, got {count}, {first} and {side}")
        self.count, self.first, self.side = count, first, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, _, label = self._draw(index)
        return image, label

    def mask(self, index: int) -> np.ndarray:
        """bool (side, side): the object's pixels."""
        return self._draw(index)[1]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All scenes: images uint8 (N, 3, side, side), classes (N,), masks bool (N, side, side)."""
        images, masks, labels = zip(*(self._draw(i) for i in range(self.count)))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels), torch.from_numpy(np.stack(masks))

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        random = generator(self.first + index, _HUES)
        label = int(random.integers(self.n_classes))
        mask = _blob(self.side, random)
        clutter = _clutter(self.side, random)
        image = np.where(mask[..., None], _surface(self.side, label / _HUES, random), clutter)
        light = random.uniform(0.4, 1.25)
        noise = random.normal(0, 8, image.shape)
        return (image * light + noise).clip(0, 255).astype(np.uint8), mask, label


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _blob(side: int, random: np.random.Generator) -> np.ndarray:
    """A wobbly disc of 16 to 32 % of the area, wholly inside: bool (side, side)."""
    y, x = np.mgrid[0:side, 0:side]
    radius = side * np.sqrt(random.uniform(0.16, 0.32) / np.pi)
    row, column = random.uniform(1.3 * radius, side - 1.3 * radius, 2)
    angle = np.arctan2(y - row, x - column)
    wobble = sum(random.uniform(-0.1, 0.1) * np.sin(k * angle + random.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    return np.hypot(y - row, x - column) < radius * (1 + wobble)


def _surface(side: int, hue: float, random: np.random.Generator) -> np.ndarray:
    """Stripes or checks of a hue, turned at random, in every pixel (side, side, 3)."""
    y, x = np.mgrid[0:side, 0:side] * (64 / side)
    turn, phase = random.uniform(0, np.pi, 2)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave = np.sin(u + phase) if random.random() < 0.5 else np.sin(u * 0.7 + phase) * np.sin(v * 0.7)
    return _color(hue, random.uniform(0.7, 1), random.uniform(0.75, 1)) * (0.7 + 0.3 * np.sign(wave))[..., None]


def _clutter(side: int, random: np.random.Generator) -> np.ndarray:
    """Rectangles in weak colours, over each other: (side, side, 3)."""
    ground = np.full((side, side, 3), random.uniform(60, 190))
    for _ in range(60):
        top, left = random.integers(-side // 4, side, 2)
        height, width = random.integers(side // 16, side // 3, 2)
        color = _color(random.random(), random.uniform(0, 0.5), random.uniform(0.08, 0.92))
        ground[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = color
    return ground
