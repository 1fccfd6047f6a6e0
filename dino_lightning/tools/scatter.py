"""A map of images to look around in, in HTML: points, of which the one under the pointer is shown."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from dino_lightning.tools.page import data_address


class Points(NamedTuple):
    """Images as points of a plane: a map (N, 2) for each way to lay them out, and of each image a name, a class and a small picture.

    ``labels`` index ``classes``; without classes all are alike. ``pictures`` are squares, all of one size.
    """

    maps: dict[str, Sequence[Sequence[float]]]
    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    pictures: Sequence[Image.Image]


def as_map(points: Points) -> str:
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
