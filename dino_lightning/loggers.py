"""Weights & Biases for runs that are interrupted and resumed."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only


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
            RuntimeError: if W&B does not begin it, as without a key where nobody can be asked for one.
        """
        import wandb  # not before it is used

        try:
            return super().experiment
        except wandb.Error as error:
            raise RuntimeError(
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
