"""The whole configuration of a run of the command line, kept with the run."""

import os

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder, also with W&B and over that of an earlier run, and tells the loggers.

    Its part of a checkpoint is the id of the W&B run, with which a resumed run goes on.
    """

    _wandb_id: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or stage != "fit":
            return
        _check_same_checkpoint(trainer)
        folder = run_folder(trainer)
        self._wandb_id = next((logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
        if trainer.is_global_zero:
            os.makedirs(folder, exist_ok=True)
            self.parser.save(
                self.config, os.path.join(folder, "config.yaml"), skip_none=False, overwrite=True, multifile=False
            )
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for logger in trainer.loggers:
                logger.log_hyperparams(config)
        self.already_saved = True

    def state_dict(self) -> dict[str, str | None]:
        return {"wandb_id": self._wandb_id}


def _check_same_checkpoint(trainer: Trainer) -> None:
    """Each process looks for ``--ckpt_path last`` by itself."""
    chosen = trainer.strategy.broadcast(trainer.ckpt_path)
    if chosen != trainer.ckpt_path:
        raise RuntimeError(
            f"rank 0 resumes {chosen}, rank {trainer.global_rank} {trainer.ckpt_path}: another run writes below the same root "
            "folder; name the checkpoint, or give each run a trainer.default_root_dir of its own"
        )


def run_folder(trainer: Trainer) -> str:
    """Where this run writes, the same on all ranks: the folder whose ``checkpoints/`` Lightning's ModelCheckpoint uses."""
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    else:
        folder = trainer.default_root_dir
    return trainer.strategy.broadcast(folder)
