"""Writes the features of a prediction run to files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from tqdm import tqdm

from dino_lightning.callbacks.run_folder import run_folder


class FeatureWriter(BasePredictionWriter):
    """``features.npy``, float32 (N, D), and ``paths.txt``, a line for each row, in the run folder.

    With several devices each writes the features of its share of the images (``features.1.npy``, ... for the others).
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        vectors, paths = zip(*predictions)
        features = torch.cat(vectors).float().cpu().numpy()
        folder = Path(run_folder(trainer))
        folder.mkdir(parents=True, exist_ok=True)
        rank = f".{trainer.global_rank}" if trainer.global_rank else ""
        np.save(folder / f"features{rank}.npy", features)
        named = None not in paths  # images alone come without
        if named:
            names = "".join(f"{path}\n" for batch in paths for path in batch)
            (folder / f"paths{rank}.txt").write_text(names, encoding="utf-8")
        if trainer.is_global_zero:
            also = ", and paths.txt with a line for each row" if named else ""
            tqdm.write(f"{len(features)} features written to {folder}: features.npy{also}")
