"""The views of an image, as far as a worker decides them: crops, flips, and what to paint.

A worker samples everything random and cuts the crops; the device paints them (``painting.py``). Distributions are those of
the reference (paper, appendix E; BYOL's augmentations): two global crops and several local ones, all from the whole image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino_lightning.data.painting import PAINT
from dino_lightning.training.randomness import generator

_RATIO = (3 / 4, 4 / 3)  # width over height of a crop, log-uniform
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
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be 0 ≤ low ≤ high in pixels, got {self.blur_sigma}")
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
        return 2 + self.local_crops_number

    def __call__(self, image: np.ndarray, *key: int) -> tuple[list[Tensor], np.ndarray]:
        """An image (H, W, C) of uint8 → V crops (C, h, w) of uint8, and how to paint them, (V,) of ``PAINT``.

        ``key`` (seed, epoch, sample) alone decides what is drawn.
        """
        pixels = torch.from_numpy(image)
        recipe = np.zeros(self.n_views, PAINT)
        crops = []
        for view in range(self.n_views):
            random = generator(*key, view)
            crops.append(self._crop(pixels, view, random))
            recipe[view] = self._decide_paint(view, random)
        return crops, recipe

    def reduction(self, height: int, width: int) -> int:
        """By how much (1, 2, 4 or 8) an image may be made smaller before it is cropped: every crop still shrinks by 1.5 or more.

        Measured on JPEGs of 4000×3000 that their decoder reduced by 4: crops are 0.2 to 0.3 of 255 levels off on average, the
        smallest 0.5.
        """
        sides = [
            math.sqrt(height * width * scale[0] * _RATIO[0]) / max(size)  # of the smallest crop, in pixels of its own
            for scale, size in (
                (self.global_crops_scale, self.global_crops_size),
                *([(self.local_crops_scale, self.local_crops_size)] if self.local_crops_number else []),
            )
        ]
        return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor * _SHRINKING <= min(sides))

    def _crop(self, pixels: Tensor, view: int, random: np.random.Generator) -> Tensor:
        is_global = view < 2
        size = self.global_crops_size if is_global else self.local_crops_size
        scale = self.global_crops_scale if is_global else self.local_crops_scale
        top, left, height, width = crop_box(*pixels.shape[:2], scale, random)
        crop = resize(pixels[top : top + height, left : left + width], size)
        flips = [dim for dim, p in ((-1, self.hflip_p), (-2, self.vflip_p)) if random.random() < p]
        return crop.flip(flips) if flips else crop

    def _decide_paint(self, view: int, random: np.random.Generator) -> tuple:
        """One record. Every number is drawn every time, so that one option does not change the draws of another."""
        jitter, gray, blur, solarize = random.random(4).tolist()
        order = random.permutation(4)
        strength = np.asarray(self.color_jitter)
        *factors, hue = random.uniform(-strength, strength).tolist()
        sigma = random.uniform(*self.blur_sigma)
        brightness, contrast, saturation = (max(0.0, 1 + factor) for factor in factors)
        sigma = sigma if blur < self.blur_p[min(view, 2)] else 0
        solarizes = view == 1 and solarize < self.solarize_p
        return jitter < self.jitter_p, order, brightness, contrast, saturation, hue, gray < self.grayscale_p, sigma, solarizes


def crop_box(
    height: int, width: int, scale: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: area uniform in ``scale``, aspect ratio log-uniform in 3/4 to 4/3.

    After ten boxes that do not fit, the largest central one of an allowed ratio (torchvision's RandomResizedCrop).
    """
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (H, W, C) of uint8 → (C, h, w) of uint8, bicubic and antialiased.

    Equal to PIL's resize to within one level, but for a few values in 100,000 of photographs (at sharp edges, up to five levels) and
    fewer than one pixel in a thousand of pure noise.
    """
    # The crop is copied first: a dense channels-last image takes torch's fast path, eight times faster than PIL.
    image = pixels.contiguous().permute(2, 0, 1)[None]
    return F.interpolate(image, size, mode="bicubic", antialias=True)[0]


def trim(pixels: Tensor, most: int = 16) -> Tensor:
    """The centre of an extremely long image: what is ``most`` times as long as wide, of which evaluation sees the middle."""
    height, width = pixels.shape[:2]
    rows, columns = max(0, height - most * width) // 2, max(0, width - most * height) // 2
    return pixels[rows : height - rows, columns : width - columns]


def center_view(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The view for evaluation: an image (H, W, C) of uint8 → (C, h, w) of uint8.

    Resized until it covers 256/224 of ``size`` (a shorter side of 256 for 224), then the centre is cut out.
    """
    pixels = trim(torch.from_numpy(image))
    height, width = pixels.shape[:2]
    factor = max(size[0] / height, size[1] / width) * 256 / 224
    covering = resize(pixels, (max(size[0], int(height * factor + 1e-6)), max(size[1], int(width * factor + 1e-6))))
    top, left = (round((covering.shape[1 + i] - size[i]) / 2) for i in (0, 1))
    return covering[:, top : top + size[0], left : left + size[1]]


def whole_view(image: np.ndarray, shorter: int, multiple: int) -> Tensor:
    """The whole of an image (H, W, C) of uint8 → (C, h, w) of uint8, for attention maps.

    Its shorter side becomes ``shorter`` pixels and its shape stays, both rounded to a ``multiple``, the patch size.
    """
    pixels = trim(torch.from_numpy(image))
    scale = shorter / min(pixels.shape[:2])
    height, width = (max(1, round(side * scale / multiple)) * multiple for side in pixels.shape[:2])
    return resize(pixels, (height, width))
