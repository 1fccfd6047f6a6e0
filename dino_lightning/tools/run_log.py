"""The course of a run, read from the log beside its checkpoints."""

import csv
import importlib.util
from pathlib import Path

Curves = dict[str, list[tuple[float, float]]]  # of each key (step, value), the earliest first


def rows(folder: Path) -> list[dict[str, str]]:
    """Of a run folder's ``metrics.csv``, the oldest first."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curves(folder: Path, keys: tuple[str, ...]) -> Curves:
    """What a run folder says of keys such as train/loss: of CSVLogger, or of TensorBoardLogger where tensorboard is installed."""
    if (folder / "metrics.csv").is_file():
        told = rows(folder)
        found = {key: [(float(row["step"]), float(row[key])) for row in told if row.get(key)] for key in keys}
    else:
        found = _of_tensorboard(folder, keys)
    return {key: points for key, points in found.items() if points}


def _of_tensorboard(folder: Path, keys: tuple[str, ...]) -> Curves:
    if not any(folder.glob("events.out.tfevents*")) or importlib.util.find_spec("tensorboard") is None:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    there = set(events.Tags()["scalars"]) & set(keys)
    return {key: [(float(event.step), event.value) for event in events.Scalars(key)] for key in there}
