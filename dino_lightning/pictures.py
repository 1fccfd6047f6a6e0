"""Pictures for people: what a network looks at, drawn over images and laid out in sheets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dino_lightning.evaluation.pca import pca_rgb

_HEAT = np.array([[0, 0, 4], [80, 18, 123], [187, 55, 84], [249, 142, 9], [252, 255, 164]])  # dark to bright, evenly spaced
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_GAP = 6  # pixels between cells
_CAPTION = 12  # pixels of a caption's letters


def rgb(image: Tensor) -> np.ndarray:
    """An image (C, H, W) of uint8 as colours (H, W, 3); fewer than three are shown as gray by their first one, of more the first three."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).cpu().numpy()


def heat_map(image: Tensor, attention: Tensor, span: tuple[float, float] | None = None) -> np.ndarray:
    """Attention (h, w) over an image (C, H, W) of uint8: colours (H, W, 3) from dark at the lower end of the span to bright.

    Without a span, from the least patch to the greatest.
    """
    low, high = span or (attention.min().item(), attention.max().item())
    strength = ((attention.float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
    strength = F.interpolate(strength[None, None], image.shape[-2:], mode="bilinear")[0, 0].numpy()
    stops = np.linspace(0, 1, len(_HEAT))
    colors = np.stack([np.interp(strength, stops, channel) for channel in _HEAT.T], axis=-1)
    gray = rgb(image).mean(axis=-1, keepdims=True)
    return (0.75 * colors + 0.25 * gray).astype(np.uint8)


def cut_out(image: Tensor, mask: Tensor) -> np.ndarray:
    """An image (C, H, W) of uint8 with what lies outside of the mask (h, w), of any size, darkened: colours (H, W, 3)."""
    inside = F.interpolate(mask[None, None].float().cpu(), image.shape[-2:], mode="nearest")[0, 0].numpy()
    return (rgb(image) * (0.15 + 0.85 * inside[..., None])).astype(np.uint8)


def framed(colors: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Colours (H, W, 3) as large as fits into the middle of a cell, whose proportions may be others."""
    picture, size = Image.fromarray(colors), cell[::-1]
    resample = Image.Resampling.NEAREST if colors.shape[1] <= cell[1] else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.pad(picture, size, resample, _PAPER))


def sheet(rows: Sequence[Sequence[np.ndarray | str]], headings: Sequence[str], *, cell: tuple[int, int], title: str = "") -> Image.Image:
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


def attention_sheet(
    images: Tensor, attention: Tensor, masks: Tensor, names: Sequence[str], captions: Sequence[str], title: str
) -> Image.Image:
    """What each head looks at: for each image a row of heat maps, and below it the patches that its mask marks.

    A single map, which needs no comparison, has its mask beside it.

    Args:
        images: uint8 (B, C, H, W).
        attention: (B, heads, h, w); any maps will do.
        masks: bool (B, heads, h, w).
        names: of the heads.
        captions: of the images.
        title: of the sheet.
    """
    height, width = images.shape[-2:]
    scale = max(150 / max(height, width), 90 / width)
    cell = (round(height * scale), round(width * scale))
    rows = []
    for image, maps, marks, caption in zip(images, attention, masks, captions):
        heats, marked = [heat_map(image, one) for one in maps], [cut_out(image, one) for one in marks]
        if len(names) == 1:
            rows.append([rgb(image), *heats, *marked, caption])
        else:
            rows += [[rgb(image), heat_map(image, maps.mean(dim=0)), *heats], [caption, "", *marked]]
    headings = ["image", *names, "mask", ""] if len(names) == 1 else ["image", "mean", *names]
    return sheet(rows, headings, cell=cell, title=title)


def pca_sheet(images: Sequence[Tensor], features: Sequence[Tensor], title: str) -> Image.Image:
    """The principal components of the patch features, of each image alone and of all together (``pca_rgb``).

    Args:
        images: uint8 (C, H, W) each.
        features: of each (D, h, w).
        title: of the sheet, to which it adds what is shown.
    """
    together, alone = pca_rgb(features), [pca_rgb([one])[0] for one in features]
    shapes = [(image.shape[1] / max(image.shape[1:]), image.shape[2] / max(image.shape[1:])) for image in images]
    cell = tuple(round(150 * max(sides)) for sides in zip(*shapes))
    groups = []
    for image, shared, own in zip(images, together, alone):
        cells = [rgb(image), *(heat_map(image, one[..., 0], (0, 1)) for one in (own, shared)), _enlarged(shared, image.shape[1:])]
        groups.append([framed(colors, cell) for colors in cells])
    beside = 1 if len(groups) <= 4 else 2  # groups in a row, so that the sheet is no ribbon
    blank = [np.full((*cell, 3), _PAPER, dtype=np.uint8)] * 4
    groups += [blank] * (-len(groups) % beside)
    rows = [sum(groups[i : i + beside], []) for i in range(0, len(groups), beside)]
    headings = ["image", "1st component,\nthis image alone", "1st component,\nall images", "1st, 2nd, 3rd as\nred, green, blue"]
    return sheet(rows, headings * beside, cell=cell, title=f"{title}: principal components of the patch features")


def _enlarged(colors: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Colours (h, w, 3) in [0, 1] → (H, W, 3) of uint8, each patch a rectangle."""
    patches = F.interpolate(colors.permute(2, 0, 1)[None].cpu(), size, mode="nearest")[0]
    return (255 * patches).round().byte().permute(1, 2, 0).numpy()
