"""A run's pictures: kept in its folder, and on their way to the loggers that take any."""

import logging
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

log = logging.getLogger(__name__)


@rank_zero_only
def keep_picture(trainer: Trainer, file: Path, key: str, picture: Image.Image) -> None:
    """Writes a picture of this step and records it with W&B and TensorBoard; other loggers of the run take none.

    A file that cannot be written is no reason to end a run: that is a warning.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    except OSError as error:
        log.warning("no picture %s: %s", file, error.strerror or error)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")
