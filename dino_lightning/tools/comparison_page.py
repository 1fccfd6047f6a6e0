"""What ``dino-lightning compare`` shows: a table, and a page that needs nothing but itself."""

import html
from collections.abc import Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 50, 40
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by all eyes (Okabe and Ito)
_HEADS = ("method", "k-NN %", "linear %", "rank", "images/s", "memory MB", "parameters M")


def table(results: Sequence[Any]) -> str:
    """In Markdown, the best k-NN first."""
    rows = [_HEADS, ["---"] * len(_HEADS), *map(_cells, _ranked(results))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(about: str, results: Sequence[Any]) -> str:
    """In HTML: the table, and k-NN against minutes."""
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(result))}</tr>" for result in _ranked(results))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Methods compared</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; width: 100% }} th, td {{ text-align: right; padding: .3em .6em; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }} svg {{ width: 100%; height: auto }}
</style></head><body>
<h1>Methods compared</h1>
<p>{html.escape(about)}.</p>
<table><tr>{heads}</tr>{rows}</table>
<h2>k-NN accuracy against minutes of training</h2>
{_plot(results)}
<p>Short runs favour other methods than long ones, and no method was tuned for these images. MAE's features are poor neighbours by nature,
and are meant to be fine-tuned.</p>
</body></html>
"""


def _ranked(results: Sequence[Any]) -> list[Any]:
    return sorted(results, key=lambda result: -result.knn)


def _cells(result: Any) -> list[str]:
    percent = [f"{100 * value:.1f}" for value in (result.knn, result.linear)]
    return [result.method, *percent, f"{result.rank:.0f}", f"{result.images_per_s:.0f}", f"{result.megabytes:.0f}", f"{result.parameters:.1f}"]


def _plot(results: Sequence[Any]) -> str:
    """Lines in SVG, each with its method's name at its end."""
    points = [point for result in results for point in result.curve]
    longest = max((minutes for minutes, _ in points), default=1) or 1
    low, high = (bound(value for _, value in points) for bound in (min, max))
    low, high = max(0, low - 0.02), min(1, high + 0.02)
    right = _WIDTH - 90  # the names stand there

    def place(minutes: float, value: float) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * minutes / longest
        return round(x, 1), round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 10) * (value - low) / (high - low), 1)

    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(0, value)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#ddd"/><text x="4" y="{y + 4}">{100 * value:.0f} %</text>')
        x, _ = place(longest * i / 4, low)
        parts.append(f'<text x="{x - 8}" y="{_HEIGHT - 14}">{longest * i / 4:g}</text>')
    taken: list[float] = []
    for result, colour in zip(_ranked(results), _COLOURS * len(results)):
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in result.curve))
        _, y = place(*result.curve[-1])
        y = max([y, *(other + 14 for other in taken)])  # the best stand first, and highest
        taken.append(y)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 6}" y="{y + 4}" fill="{colour}">{html.escape(result.method)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" role="img" aria-label="k-NN against minutes">{"".join(parts)}</svg>'
