"""Loggers for runs that are interrupted and resumed."""

import csv
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from dino_lightning.training.checkpoint_io import DiskFullError, is_full


class AppendingCSVLogger(LightningCSVLogger):
    """Lightning's, which goes on with the ``metrics.csv`` of a run folder, where Lightning's deletes it.

    A line that a full disk or a killed process left half written is dropped then.

    Args:
        save_dir: as Lightning's.
        name: likewise.
        version: likewise.
        prefix: likewise.
        flush_logs_every_n_steps: likewise.
        first_step: the first one that is taken in this sitting: a run that was killed may have logged it and later ones before.
    """

    def __init__(
        self,
        save_dir: str,
        name: str = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
        first_step: int = 0,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self.first_step = first_step
        self._opened = False

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer. Lightning deletes the file when it makes one; here it gets back what is not taken again."""
        if not self._opened and rank_zero_only.rank == 0:
            self._opened = True
            file = Path(self.log_dir) / "metrics.csv"
            kept = file.with_suffix(".kept")  # also what a process that was killed in here left
            if file.exists():
                os.replace(file, kept)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Experiment logs directory")
                writer = super().experiment
            if kept.exists():
                with open(kept, newline="") as lines:
                    reader = csv.DictReader(lines)
                    rows = [row for row in reader if _is_whole(row) and int(row["step"]) < self.first_step]
                writer.metrics_keys = list(reader.fieldnames or [])
                with open(file, "w", newline="") as lines:
                    earlier = csv.DictWriter(lines, writer.metrics_keys)
                    earlier.writeheader()
                    earlier.writerows(rows)
                kept.unlink()
        return super().experiment

    @rank_zero_only
    def save(self) -> None:
        """Writes what was logged since the last time.

        Raises:
            DiskFullError: if there is no room for it.
        """
        try:
            super().save()
        except OSError as error:
            if not is_full(error):
                raise
            file = Path(self.log_dir) / "metrics.csv"
            raise DiskFullError(f"no room for the log {file}: make room on its disk and go on with --ckpt_path last") from error


def _is_whole(row: Mapping[str | None, Any]) -> bool:
    """Whether a row has exactly the header's cells: DictReader gives None for those that lack, and puts surplus ones under the key None."""
    return None not in row and None not in row.values() and row["step"].isdecimal()


class LoggerError(ValueError):
    """A logger could not start."""


class WandbLogger(LightningWandbLogger):
    """Lightning's, which after a resume in the same W&B run does not record again what the run has recorded before.

    A run that was killed has recorded steps since its last checkpoint, and takes them again. What was recorded stands in
    ``recorded.txt`` beside the run's checkpoints. (``--ckpt_path last`` goes on with the W&B run; in Python give its ``id``.)
    """

    _recorded: dict[int, set[str]] | None = None  # names by step, of earlier sittings

    @property
    def experiment(self) -> Any:
        """The W&B run, which begins when it is first asked for: before the training.

        Raises:
            LoggerError: if W&B does not begin it, as without a key where nobody can be asked for one.
        """
        import wandb  # not before it is used

        try:
            return super().experiment
        except wandb.Error as error:
            raise LoggerError(
                f"W&B does not begin a run: {error} Without an account, or a network, WANDB_MODE=offline records it on this machine; "
                "`wandb login` keeps your key, once for all runs"
            ) from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            super().log_metrics(metrics)
            return
        self.experiment  # noqa: B018  begins the run, which has an id from then on
        file = Path(self.save_dir or ".") / str(self.name) / str(self.version) / "recorded.txt"
        if self._recorded is None:
            self._recorded = _read(file)
        # Lightning adds the epoch to every row; what else a row holds differs between sittings (a meter has yet to fill).
        new = set(metrics) - self._recorded.get(step, set()) - {"epoch"}
        if not new:
            return
        super().log_metrics({name: value for name, value in metrics.items() if name in new or name == "epoch"}, step)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as lines:
            lines.write("\t".join([str(step), *sorted(new)]) + "\n")


def _read(file: Path) -> dict[int, set[str]]:
    recorded: dict[int, set[str]] = defaultdict(set)
    for line in file.read_text().splitlines() if file.exists() else ():
        step, *names = line.split("\t")
        recorded[int(step)].update(names)
    return recorded
