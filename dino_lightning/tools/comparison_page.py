"""What ``dino-lightning compare`` shows: a table, and a page that needs nothing but itself."""

from collections.abc import Sequence
from typing import Any

from dino_lightning.tools import page as html

_HEADS = ("method", "k-NN %", "linear %", "rank", "images/s", "memory MB", "parameters M")


def table(results: Sequence[Any]) -> str:
    """In Markdown, the best k-NN first."""
    rows = [_HEADS, ["---"] * len(_HEADS), *_rows(results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(about: str, results: Sequence[Any]) -> str:
    """In HTML: the table, and k-NN against minutes."""
    what = "k-NN accuracy against minutes of training"
    return html.document(
        "Methods compared",
        f"{html.paragraph(f'{about}.')}\n{html.table(_HEADS, _rows(results))}\n<h2>{what}</h2>\n"
        + html.lines([html.Line(result.method, result.curve) for result in results], what)
        + html.paragraph(
            "Short runs favour other methods than long ones, and no method was tuned for these images. MAE's features are poor "
            "neighbours by nature, and are meant to be fine-tuned."
        ),
    )


def _rows(results: Sequence[Any]) -> list[list[str]]:
    return [_cells(result) for result in sorted(results, key=lambda result: -result.knn)]


def _cells(result: Any) -> list[str]:
    percent = [f"{100 * value:.1f}" for value in (result.knn, result.linear)]
    return [result.method, *percent, f"{result.rank:.0f}", f"{result.images_per_s:.0f}", f"{result.megabytes:.0f}", f"{result.parameters:.1f}"]
