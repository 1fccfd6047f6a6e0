"""The whole configuration of a run of the command line, kept with the run."""

import os
import textwrap
from pathlib import Path

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from dino_lightning.callbacks.run_folder import run_folder
from dino_lightning.training.plan import Unsaid


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder, also with W&B and over that of an earlier run, and tells the loggers.

    Its part of a checkpoint is this folder and the id of the W&B run, with which a resumed run goes on.
    """

    header = ""  # comments that config.yaml begins with
    _wandb_id: str | None = None
    _folder: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or stage != "fit":
            return
        folder = self._folder = run_folder(trainer)
        self._wandb_id = next((logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
        if trainer.is_global_zero:
            os.makedirs(folder, exist_ok=True)
            config = _anywhere(self.config)
            self.parser.save(config, os.path.join(folder, "config.yaml"), skip_none=False, overwrite=True, multifile=False)
            if self.header:
                path = Path(folder, "config.yaml")
                path.write_text(f"{textwrap.indent(self.header, '# ')}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
            for logger in trainer.loggers:
                logger.log_hyperparams(yaml.safe_load(self.parser.dump(config, skip_none=False)))
        self.already_saved = True

    def state_dict(self) -> dict[str, str | None]:
        return {"wandb_id": self._wandb_id, "folder": self._folder and os.path.abspath(self._folder)}


def _anywhere(config: Namespace) -> Namespace:
    """A configuration that gives the same run, from the beginning, whatever folder is the current one."""
    config = config.clone()
    config.ckpt_path = None
    for name, value in list(config.model.items()):
        if isinstance(value, Unsaid):
            del config[f"model.{name}"]  # else it would have been asked for in the next run
    for name in ("data.root", "model.weights", "trainer.default_root_dir", "checkpoint.dirpath"):
        path = config.get(name)
        if path and "://" not in str(path) and (name != "model.weights" or os.path.exists(path)):  # or a published name
            config[name] = os.path.abspath(os.path.expanduser(path))
    return config
