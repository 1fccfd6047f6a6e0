"""What ``dino-lightning compare`` shows: a table, and a page that needs nothing but itself."""

from collections.abc import Sequence
from typing import NamedTuple

from dino_lightning.tools import page

_HEADS = ("method", "k-NN %", "linear %", "rank", "images/s", "memory MB", "parameters M")


class Result(NamedTuple):
    """Of a method.

    Attributes:
        method: its name.
        knn: top-1 of 20 neighbours after the run, as a fraction.
        linear: top-1 of the best linear classifier, as a fraction.
        rank: RankMe of the bank's features.
        images_per_s: of training.
        megabytes: the most that the process had in memory.
        parameters: of the backbone, in millions.
        curve: (minutes, k-NN top-1), from the untrained network on, with a bank of at most 10,000 images.
    """

    method: str
    knn: float
    linear: float
    rank: float
    images_per_s: float
    megabytes: float
    parameters: float
    curve: list[tuple[float, float]]


def as_markdown(results: Sequence[Result]) -> str:
    """In Markdown, the best k-NN first."""
    rows = [_HEADS, ["---"] * len(_HEADS), *_rows(results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_page(about: str, results: Sequence[Result]) -> str:
    """In HTML: the table, and k-NN against minutes."""
    what = "k-NN accuracy against minutes of training"
    honest = (
        "Short runs favour other methods than long ones, and no method was tuned for these images. MAE's features are poor neighbours by nature, "
        "and are meant to be fine-tuned."
    )
    curves = page.lines([page.Line(result.method, result.curve) for result in results], what)
    body = [page.paragraph(f"{about}."), page.table(_HEADS, _rows(results)), f"<h2>{what}</h2>", curves, page.paragraph(honest)]
    return page.document("Methods compared", "\n".join(body))


def _rows(results: Sequence[Result]) -> list[list[str]]:
    return [_cells(result) for result in sorted(results, key=lambda result: -result.knn)]


def _cells(result: Result) -> list[str]:
    percent = [f"{100 * value:.1f}" for value in (result.knn, result.linear)]
    return [
        result.method,
        *percent,
        f"{result.rank:.0f}",
        f"{result.images_per_s:.0f}",
        f"{result.megabytes:.0f}",
        f"{result.parameters:.1f}",
    ]
