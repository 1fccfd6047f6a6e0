"""The whole configuration of a run of the command line, kept with the run."""

import os

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder, also with W&B and over that of an earlier run, and tells the loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or stage != "fit":
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            os.makedirs(folder, exist_ok=True)
            self.parser.save(
                self.config, os.path.join(folder, "config.yaml"), skip_none=False, overwrite=True, multifile=False
            )
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for logger in trainer.loggers:
                logger.log_hyperparams(config)
        self.already_saved = True


def run_folder(trainer: Trainer) -> str:
    """Where this run writes, the same on all ranks: the folder whose ``checkpoints/`` Lightning's ModelCheckpoint uses."""
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    else:
        folder = trainer.default_root_dir
    return trainer.strategy.broadcast(folder)
