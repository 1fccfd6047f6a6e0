"""How the tools train and report classifiers: one device, a progress bar, nothing written that was not asked for."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from dino_lightning.classifiers.classification import Standing
from dino_lightning.training.checkpoint_io import AtomicCheckpointIO


def train_classifier(
    module: LightningModule,
    data: LightningDataModule | tuple[DataLoader, DataLoader],
    *,
    epochs: int,
    title: str,
    callbacks: Sequence[Callback] = (),
    precision: Any = "32-true",
) -> None:
    """Fits the module on a data module or on (training, validation) loaders."""
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, _Progress(title)],
        plugins=[AtomicCheckpointIO()],
    )
    if isinstance(data, LightningDataModule):
        trainer.fit(module, data)
    else:
        trainer.fit(module, *data)


class _Progress(Callback):
    """One bar for all epochs, with the newest validated accuracy."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = int(trainer.num_training_batches)
        self._bar = tqdm(total=batches * trainer.max_epochs, desc=self.title, leave=False, unit="batch")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._bar.update()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.set_postfix_str(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()


def new_file(path: str) -> Path:
    """The path of a file that is not there yet, in a folder that is.

    Raises:
        FileExistsError: if there is something, which may be the result of hours.
    """
    if Path(path).exists():
        raise FileExistsError(f"there is already something at {path}; give another --output, or move it away")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def best_of_last(found: Mapping[float, Standing]) -> float:
    """The best top-1 accuracy of the last epoch, over the learning rates."""
    return max(standing.last[0] for standing in found.values())


@contextlib.contextmanager
def hushed(errors: bool = False) -> Iterator[None]:
    """Without what a tool prints; its progress and its warnings stay, unless they are asked away too."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) if errors else contextlib.nullcontext():
        yield


def print_standings(rows: Sequence[tuple[str, Standing]], chosen: str) -> None:
    """A line for each classifier, in per cent, and that what was ``chosen`` on the queries is optimistic there."""
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}}   last epoch      best epoch")
    for name, standing in rows:
        values = (f"{100 * top1:5.1f} /{100 * top5:5.1f}" for top1, top5 in (standing.last, standing.best))
        print(f"{name:{width}} {'    '.join(values)}   (epoch {standing.best_epoch + 1})")
    print(f"The queries themselves chose the best {chosen}: what it reaches on them is optimistic.")
