"""Weights & Biases for runs that are interrupted and resumed."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only


class WandbLogger(LightningWandbLogger):
    """Lightning's, which after a resume in the same W&B run does not record again what the run has recorded before.

    A run that was killed has recorded steps since its last checkpoint, and takes them again. What was recorded stands in
    ``recorded.txt`` beside the run's checkpoints. (``--ckpt_path last`` goes on with the W&B run; in Python give its ``id``.)
    """

    _recorded: set[str] | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            super().log_metrics(metrics)
            return
        self.experiment  # noqa: B018  begins the run, which has an id from then on
        file = Path(self.save_dir or ".") / str(self.name) / str(self.version) / "recorded.txt"
        if self._recorded is None:
            self._recorded = set(file.read_text().splitlines()) if file.exists() else set()
        line = " ".join([str(step), *sorted(metrics)])
        if line in self._recorded:
            return
        super().log_metrics(metrics, step)
        self._recorded.add(line)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as lines:
            lines.write(line + "\n")
