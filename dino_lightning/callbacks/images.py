"""Pictures on their way to the loggers that take any."""

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image


@rank_zero_only
def log_picture(trainer: Trainer, key: str, picture: Image.Image) -> None:
    """Records a picture of this step with W&B and TensorBoard; other loggers of the run take none."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")
