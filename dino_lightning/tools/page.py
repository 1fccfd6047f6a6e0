"""Pages in HTML that need nothing but themselves: tables, lines and pictures, all in one file."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by all eyes (Okabe and Ito)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 50, 40
_QUALITY = 88  # of JPEGs

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% } th, td { text-align: right; padding: .3em .6em; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } svg, img { max-width: 100%; height: auto }
td { font-variant-numeric: tabular-nums } h2 { margin-top: 2em } .group td { padding-top: 1.5em; font-weight: 600 }
.group p { margin: 0; font-weight: 400; font-size: 14px; color: #555 }
.map { position: relative } .map canvas { width: 100%; border: 1px solid #ddd; cursor: crosshair } .map button { margin: 0 .4em .4em 0 }
.legend button { border: 1px solid #ddd; background: none; border-radius: 1em; cursor: pointer } .legend .off { opacity: .3 }
.tip { position: absolute; pointer-events: none; background: #fff; border: 1px solid #999; padding: 4px; font-size: 13px; display: none }
"""


class Line(NamedTuple):
    """Points (x, y) with a name."""

    name: str
    points: Sequence[tuple[float, float]]


def document(title: str, body: str) -> str:
    """A whole page; ``body`` is HTML already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


class Heading(NamedTuple):
    """Of the rows of a table below it, with what they say."""

    title: str
    about: str


def table(heads: Sequence[str], rows: Sequence[Sequence[str] | Heading]) -> str:
    """Plain text in cells, the heads above them."""
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f"<table><tr>{top}</tr>{''.join(_row(row, len(heads)) for row in rows)}</table>"


def _row(row: Sequence[str] | Heading, columns: int) -> str:
    if isinstance(row, Heading):
        return f'<tr class="group"><td colspan="{columns}">{html.escape(row.title)}<p>{html.escape(row.about)}</p></td></tr>'
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"


def picture(image: Image.Image, alt: str) -> str:
    """As a JPEG within the page."""
    return f'<img alt="{html.escape(alt)}" src="{data_address(image)}">'


def data_address(image: Image.Image) -> str:
    """A picture as an address, JPEG within."""
    held = io.BytesIO()
    image.convert("RGB").save(held, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def lines(drawn: Sequence[Line], what: str, percent: bool = True) -> str:
    """Lines in SVG from x = 0 on, each with its name at its end; those that stand highest at the end come first.

    Args:
        drawn: with at least one point each.
        what: is drawn, for those who do not see it.
        percent: whether y are fractions, to be shown in per cent.
    """
    points = [point for line in drawn for point in line.points]
    longest = max(x for x, _ in points) or 1
    low, high = (bound(y for _, y in points) for bound in (min, max))
    low, high = (max(0, low - 0.02), min(1, high + 0.02)) if percent else (low, high if high > low else low + 1)
    right = _WIDTH - 90  # the names stand there

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + (right - _LEFT) * x / longest, 1),
            round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 10) * (y - low) / (high - low), 1),
        )

    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(0, value)
        shown = f"{100 * value:.0f} %" if percent else f"{value:.3g}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".2"/><text x="4" y="{y + 4}">{shown}</text>'
        )
        x, _ = place(longest * i / 4, low)
        parts.append(f'<text x="{x - 8}" y="{_HEIGHT - 14}">{_number(longest * i / 4)}</text>')
    taken: list[float] = []
    for line, colour in zip(sorted(drawn, key=lambda line: -line.points[-1][1]), COLOURS * len(drawn)):
        across = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line.points))
        _, y = place(*line.points[-1])
        y = max([y, *(other + 14 for other in taken)])  # the best stand first, and highest
        taken.append(y)
        parts.append(f'<polyline points="{across}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(line.points) == 1:
            x, at = place(*line.points[0])
            parts.append(f'<circle cx="{x}" cy="{at}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 6}" y="{y + 4}" fill="{colour}">{html.escape(line.name)}</text>')
    drawn_as = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" fill="currentColor" role="img" aria-label="{html.escape(what)}"'
    return f"<svg {drawn_as}>{''.join(parts)}</svg>"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.3g}"
