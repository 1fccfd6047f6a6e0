"""The views of an image, as far as a worker decides them: crops, flips, and what to paint.

A worker samples everything random and cuts the crops; the device paints them (``painting.py``). Distributions are those of
the reference (paper, appendix E; BYOL's augmentations): two global crops and several local ones, all from the whole image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_lightning.data.geometry import resize
from dino_lightning.data.paint_records import PAINT
from dino_lightning.training.randomness import generator

_RATIO = (3 / 4, 4 / 3)  # width over height of a crop, log-uniform
_LOG_RATIO = (math.log(_RATIO[0]), math.log(_RATIO[1]))
_TRIES = 10
BOX = 2 * _TRIES + 2  # uniform numbers for a crop's box, each try's area and ratio, and the corner
_PAINT = 13  # and for its paint
_SHRINKING = 1.5  # by what the smallest crop must still shrink where an image is reduced before


@dataclass(frozen=True)
class MultiCrop:
    """Options of the augmentation; sizes are (height, width), scales are shares of the image's area.

    ``blur_p`` is for the first global, the second global, and the local views; only the second global view is solarized.
    """

    global_crops_size: tuple[int, int] = (224, 224)
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_number: int = 8
    local_crops_size: tuple[int, int] = (96, 96)
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_p: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.2
    hflip_p: float = 0.5
    vflip_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter_p", "grayscale_p", "solarize_p", "hflip_p", "vflip_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        if len(self.blur_p) != 3 or not all(0 <= p <= 1 for p in self.blur_p):
            raise ValueError(f"blur_p must be three probabilities (first global, second global, local), got {self.blur_p}")
        for name in ("global_crops_scale", "local_crops_scale"):
            scale = getattr(self, name)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"{name} must be two shares of the area 0 < low ≤ high ≤ 1, got {scale}")
        if len(self.blur_sigma) != 2 or not 0 <= self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be two numbers 0 ≤ low ≤ high in pixels, got {self.blur_sigma}")
        if len(self.color_jitter) != 4 or min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(
                "color_jitter must be four strengths (brightness, contrast, saturation, hue) of at least 0, hue at most 0.5, "
                f"got {self.color_jitter}"
            )
        if self.local_crops_number < 0:
            raise ValueError(f"local_crops_number must not be negative, got {self.local_crops_number}")
        for name in ("global_crops_size", "local_crops_size"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive pixels, got {getattr(self, name)}")

    @property
    def n_views(self) -> int:
        """V, the views of an image."""
        return 2 + self.local_crops_number

    def __call__(self, image: np.ndarray, *key: int) -> tuple[list[Tensor], np.ndarray]:
        """An image (H, W, C) of uint8 → V crops (C, h, w) of uint8, and how to paint them, (V,) of ``PAINT``.

        ``key`` (seed, epoch, sample) alone decides what is drawn.
        """
        pixels = torch.from_numpy(image)
        # A row for each view: fewer views leave the others as they were.
        box, flip, paint = np.split(generator(*key).random((self.n_views, BOX + 2 + _PAINT)), [BOX, BOX + 2], axis=1)
        boxes = crop_boxes(*image.shape[:2], self._scales, box).tolist()
        flips = (flip < (self.hflip_p, self.vflip_p)).tolist()
        crops = []
        for view, ((top, left, height, width), (mirrored, upside_down)) in enumerate(zip(boxes, flips)):
            size = self.global_crops_size if view < 2 else self.local_crops_size
            crop = resize(pixels[top : top + height, left : left + width], size)
            dims = [-1] * mirrored + [-2] * upside_down
            crops.append(crop.flip(dims) if dims else crop)
        return crops, self._decide_paint(paint)

    @property
    def _scales(self) -> np.ndarray:
        """(V, 2): least and largest share of the area."""
        return np.array([self.global_crops_scale] * 2 + [self.local_crops_scale] * self.local_crops_number)

    def reduction(self, height: int, width: int) -> int:
        """By how much (1, 2, 4 or 8) an image may be made smaller before it is cropped: every crop still shrinks by 1.5 or more.

        Measured on JPEGs of 4000×3000 that their decoder reduced by 4: crops are 0.2 to 0.3 of 255 levels off on average, the
        smallest 0.5.
        """
        sides = [
            # Of the smallest crop, in pixels of its own; of a panorama that is as high as the image.
            min(height, width, math.sqrt(height * width * scale[0] * _RATIO[0])) / max(size)
            for scale, size in (
                (self.global_crops_scale, self.global_crops_size),
                *([(self.local_crops_scale, self.local_crops_size)] if self.local_crops_number else []),
            )
        ]
        return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor * _SHRINKING <= min(sides))

    def _decide_paint(self, draws: np.ndarray) -> np.ndarray:
        """Uniform numbers (V, _PAINT) → ``PAINT`` records (V,).

        Every number is drawn every time, so that one option does not change the draws of another.
        """
        order, strengths, (jitter, gray, blur, solarize, sigma) = draws[:, :4], draws[:, 4:8], draws[:, 8:].T
        *factors, hue = ((2 * strengths - 1) * self.color_jitter).T
        first, second, local = self.blur_p
        recipe = np.zeros(self.n_views, PAINT)
        recipe["jitter"] = jitter < self.jitter_p
        recipe["order"] = order.argsort(axis=1)
        recipe["brightness"], recipe["contrast"], recipe["saturation"] = np.maximum(0, 1 + np.stack(factors))
        recipe["hue"] = hue
        recipe["gray"] = gray < self.grayscale_p
        low, high = self.blur_sigma
        recipe["blur_sigma"] = np.where(blur < [first, second, *[local] * self.local_crops_number], low + (high - low) * sigma, 0)
        recipe["solarize"][1] = solarize[1] < self.solarize_p
        return recipe


def crop_boxes(height: int, width: int, scales: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(top, left, height, width) of random crops, (n, 4): area uniform in ``scales`` (n, 2), aspect ratio log-uniform in 3/4 to 4/3.

    After ten boxes that do not fit, the largest central one of an allowed ratio (torchvision's RandomResizedCrop). ``draws`` are
    uniform numbers (n, ``BOX``).
    """
    low, high = np.asarray(scales).T[..., None]
    area = height * width * (low + (high - low) * draws[:, :_TRIES])  # (n, tries)
    ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * draws[:, _TRIES : 2 * _TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    tried = np.arange(len(draws)), fits.argmax(axis=1)  # the first that fits
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    central = min(width, round(height * ratio)), min(height, round(width / ratio))
    any_fits = fits.any(axis=1)
    w, h = (np.where(any_fits, tried_sides[tried], side) for tried_sides, side in zip((w, h), central))
    spare = np.stack([height - h, width - w])
    corner = np.where(any_fits, np.floor(draws[:, 2 * _TRIES :].T * (spare + 1)), spare // 2)
    return np.stack([*corner, h, w], axis=1).astype(int)
