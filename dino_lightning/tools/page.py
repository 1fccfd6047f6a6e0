"""Pages in HTML that need nothing but themselves: tables, lines, pictures and maps of points, all in one file."""

import base64
import html
import io
import json
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
    return f"<p>{html.escape(text)}</p>"


class Heading(NamedTuple):
    """Of the rows of a table below it, with what they say."""

    title: str
    about: str


def table(heads: Sequence[str], rows: Sequence[Sequence[str] | Heading]) -> str:
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
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".2"/><text x="4" y="{y + 4}">{shown}</text>')
        x, _ = place(longest * i / 4, low)
        parts.append(f'<text x="{x - 8}" y="{_HEIGHT - 14}">{_number(longest * i / 4)}</text>')
    taken: list[float] = []
    for line, colour in zip(sorted(drawn, key=lambda line: -line.points[-1][1]), COLOURS * len(drawn)):
        across = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line.points))
        _, y = place(*line.points[-1])
        y = max([y, *(other + 14 for other in taken)])  # the best stand first, and highest
        taken.append(y)
        parts.append(f'<polyline points="{across}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 6}" y="{y + 4}" fill="{colour}">{html.escape(line.name)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" fill="currentColor" role="img" aria-label="{html.escape(what)}">{"".join(parts)}</svg>'


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.3g}"


class Points(NamedTuple):
    """Images as points of a plane: a map (N, 2) for each way to lay them out, and of each image a name, a class and a small picture.

    ``labels`` index ``classes``; without classes all are alike. ``pictures`` are squares, all of one size.
    """

    maps: dict[str, Sequence[Sequence[float]]]
    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    pictures: Sequence[Image.Image]


def scatter(points: Points) -> str:
    """A map to look around in: the image under the pointer is shown, classes are hidden and shown by their names."""
    side, across = points.pictures[0].width, max(1, round(len(points.pictures) ** 0.5))
    together = Image.new("RGB", (side * across, side * -(-len(points.pictures) // across)))
    for i, image in enumerate(points.pictures):
        together.paste(image, (side * (i % across), side * (i // across)))
    maps = {name: [[round(float(value), 4) for value in point] for point in _unit(places)] for name, places in points.maps.items()}
    held = {
        "maps": maps, "names": list(points.names), "labels": list(points.labels), "classes": list(points.classes), "side": side, "across": across
    }  # fmt: skip
    told = json.dumps(held).replace("<", "\\u003c")  # no end of the script within it
    return (
        '<div class="map"><div class="ways"></div><canvas width="1400" height="900" role="img" aria-label="images as points"></canvas>'
        f'<div class="legend"></div><div class="tip"></div></div>\n<script>\n({_MAP})({told}, "{data_address(together)}")\n</script>'
    )


def _unit(places: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each coordinate from 0 to 1."""
    columns = []
    for column in zip(*places):
        low, span = min(column), (max(column) - min(column)) or 1
        columns.append([(value - low) / span for value in column])
    return [list(point) for point in zip(*columns)]


_MAP = """function (held, address) {
  const map = document.currentScript.previousElementSibling, canvas = map.querySelector("canvas"), tip = map.querySelector(".tip")
  const pen = canvas.getContext("2d"), edge = 30, off = new Set(), sheet = new Image()
  sheet.src = address
  const colour = label => held.classes.length ? `hsl(${label * 360 / held.classes.length} 70% ${label % 2 ? 35 : 50}%)` : "#0072b2"
  const button = (where, text, act) => {
    const made = document.createElement("button")
    made.textContent = text; made.onclick = () => { act(made); draw() }; where.append(made)
    return made
  }
  let way = Object.keys(held.maps)[0]
  const place = i => held.maps[way][i].map((value, axis) => edge + (axis ? 1 - value : value) * ((axis ? canvas.height : canvas.width) - 2 * edge))
  const shown = i => !off.has(held.labels[i])
  const draw = () => {
    pen.clearRect(0, 0, canvas.width, canvas.height)
    held.names.forEach((_, i) => {
      if (!shown(i)) return
      const [x, y] = place(i)
      pen.fillStyle = colour(held.labels[i]); pen.globalAlpha = .75
      pen.beginPath(); pen.arc(x, y, 6, 0, 7); pen.fill()
    })
  }
  if (Object.keys(held.maps).length > 1)
    for (const name of Object.keys(held.maps)) button(map.querySelector(".ways"), name, () => { way = name })
  held.classes.forEach((name, label) => {
    const made = button(map.querySelector(".legend"), name, one => one.classList.toggle("off", !off.delete(label) && off.add(label)))
    made.style.color = colour(label)
  })
  canvas.onmousemove = event => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width
    const at = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]
    let best = -1, least = 20 * 20
    held.names.forEach((_, i) => {
      const [x, y] = place(i), far = (x - at[0]) ** 2 + (y - at[1]) ** 2
      if (shown(i) && far < least) { best = i; least = far }
    })
    tip.style.display = best < 0 ? "none" : "block"
    if (best < 0) return
    tip.textContent = held.names[best] + (held.classes.length ? " (" + held.classes[held.labels[best]] + ")" : "")
    const small = document.createElement("canvas"), side = held.side
    small.width = small.height = side; small.style.display = "block"; small.style.width = 2 * side + "px"; small.style.border = "0"
    small.getContext("2d").drawImage(sheet, side * (best % held.across), side * Math.floor(best / held.across), side, side, 0, 0, side, side)
    tip.prepend(small)
    tip.style.left = Math.min(event.clientX - box.left + 16, box.width - 2 * side - 20) + "px"
    tip.style.top = canvas.offsetTop + event.clientY - box.top + 16 + "px"
  }
  canvas.onmouseleave = () => { tip.style.display = "none" }
  draw()
}"""
