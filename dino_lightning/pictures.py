"""Pictures for people: what a network looks at, drawn over images and laid out in sheets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

_HEAT = np.array([[0, 0, 4], [80, 18, 123], [187, 55, 84], [249, 142, 9], [252, 255, 164]])  # dark to bright, evenly spaced
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_GAP = 6  # pixels between cells
_CAPTION = 12  # pixels of a caption's letters


def rgb(image: Tensor) -> np.ndarray:
    """An image (C, H, W) of uint8 as colours (H, W, 3); one channel becomes gray, of more than three the first three are shown."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).cpu().numpy()


def heat_map(image: Tensor, attention: Tensor) -> np.ndarray:
    """Attention (h, w) over an image (C, H, W) of uint8: colours (H, W, 3), the least patch darkest, the greatest brightest."""
    strength = attention.float().cpu() - attention.min().item()
    strength /= strength.max().clamp(min=1e-12)
    strength = F.interpolate(strength[None, None], image.shape[-2:], mode="bilinear")[0, 0].numpy()
    stops = np.linspace(0, 1, len(_HEAT))
    colors = np.stack([np.interp(strength, stops, channel) for channel in _HEAT.T], axis=-1)
    gray = rgb(image).mean(axis=-1, keepdims=True)
    return (0.75 * colors + 0.25 * gray).astype(np.uint8)


def cut_out(image: Tensor, mask: Tensor) -> np.ndarray:
    """An image (C, H, W) of uint8 with what lies outside of the mask (h, w), of any size, darkened: colours (H, W, 3)."""
    inside = F.interpolate(mask[None, None].float().cpu(), image.shape[-2:], mode="nearest")[0, 0].numpy()
    return (rgb(image) * (0.15 + 0.85 * inside[..., None])).astype(np.uint8)


def sheet(
    rows: Sequence[Sequence[np.ndarray | str]], headings: Sequence[str], *, cell: tuple[int, int], title: str = ""
) -> Image.Image:
    """Rows of cells below their headings and a title.

    Args:
        rows: of each row its cells: colours (H, W, 3) of uint8, resized to the cell, or text.
        headings: above the columns.
        cell: (height, width) of a cell in pixels.
        title: above all.
    """
    height, width = cell
    size = max(11, min(18, width // 9))
    font, line = ImageFont.load_default(size), round(size * 1.4)
    top = _GAP + line * (1 + bool(title) + max(heading.count("\n") for heading in headings))
    columns = len(headings)
    across = max(_GAP + columns * (width + _GAP), 2 * _GAP + round(font.getlength(title)))
    page = Image.new("RGB", (across, top + _GAP + len(rows) * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP // 2), title, _INK, font)
    for column, heading in enumerate(headings):
        left = _GAP + column * (width + _GAP)
        draw.multiline_text((left + width // 2, top), heading, _INK, font, anchor="md", align="center")
        for row, cells in enumerate(rows):
            corner = (left, top + _GAP + row * (height + _GAP))
            if isinstance(cells[column], str):
                draw.multiline_text(corner, _wrapped(cells[column], font, width), _INK, font)
            else:
                enlarged = width >= cells[column].shape[1]
                resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
                page.paste(Image.fromarray(cells[column]).resize((width, height), resample), corner)
    return page


def captioned(image: np.ndarray, caption: str, lines: int) -> np.ndarray:
    """Colours (H, W, 3) of uint8 with room for ``lines`` lines of text below; a longer caption ends in an ellipsis."""
    font, line = ImageFont.load_default(_CAPTION), round(_CAPTION * 1.4)
    height, width = image.shape[:2]
    shown = _wrapped(caption, font, width - _GAP).split("\n")  # not up to the next one's
    if len(shown) > lines:
        shown[lines - 1 :] = [shown[lines - 1][:-1] + "…"]
    page = Image.new("RGB", (width, height + lines * line), _PAPER)
    page.paste(Image.fromarray(image))
    ImageDraw.Draw(page).multiline_text((0, height), "\n".join(shown), _INK, font)
    return np.asarray(page)


def _wrapped(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """Text broken anywhere into lines of at most ``width`` pixels: file names have no spaces."""
    lines = [""]
    for letter in text:
        if letter == "\n" or font.getlength(lines[-1] + letter) > width:
            lines.append("")
        lines[-1] += letter.strip("\n")
    return "\n".join(lines)


def attention_sheet(images: Tensor, attention: Tensor, masks: Tensor, captions: Sequence[str], title: str) -> Image.Image:
    """What each head looks at: for each image a row of heat maps, and below it the patches that its mask marks.

    Args:
        images: uint8 (B, C, H, W).
        attention: (B, heads, h, w).
        masks: bool (B, heads, h, w).
        captions: of the images.
        title: of the sheet.
    """
    heads = range(attention.shape[1])
    rows = []
    for image, maps, marks, caption in zip(images, attention, masks, captions):
        rows.append([rgb(image), heat_map(image, maps.mean(dim=0)), *(heat_map(image, maps[head]) for head in heads)])
        rows.append([caption, "", *(cut_out(image, marks[head]) for head in heads)])
    height, width = images.shape[-2:]
    scale = max(150 / max(height, width), 90 / width)
    return sheet(
        rows,
        ["image", "mean", *(f"head {head + 1}" for head in heads)],
        cell=(round(height * scale), round(width * scale)),
        title=title,
    )
