"""Where a run writes."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def run_folder(trainer: Trainer) -> str:
    """Where this run writes, the same on all ranks: the folder whose ``checkpoints/`` Lightning's ModelCheckpoint uses."""
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    else:
        folder = trainer.default_root_dir
    return trainer.strategy.broadcast(folder)


def last_checkpoint(trainer: Trainer) -> str:
    """Where the newest checkpoint belongs: a path or an address (s3://...), as those of the run's other checkpoints."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return os.path.join(callback.dirpath, "last.ckpt")
    return os.path.join(run_folder(trainer), "checkpoints", "last.ckpt")
