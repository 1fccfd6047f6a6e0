"""Pictures reach the loggers that take any: real W&B (offline) and TensorBoard runs, read back."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from test_cli import SMALL, read_wandb

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import AttentionMaps, SceneReport
from dino_lightning.data import Scenes

SCRIPT = """
from pathlib import Path
from types import SimpleNamespace
import wandb
from PIL import Image
from dino_lightning.callbacks.images import keep_picture
from dino_lightning.cli import main
from dino_lightning.training.loggers import WandbLogger

main(["fit", "--config", "small.yaml", "--data.root", "images", "--config", "wandb", "--trainer.default_root_dir", "runs",
      "--trainer.max_epochs", "1"])
wandb.finish()
# A run whose last checkpoint is that of step 3 draws and is killed behind step 6; resumed it goes on to step 9.
for last in (6, 9):
    logger = WandbLogger(save_dir="resumed", id="one")
    for step in range(3, last + 1, 3):
        for key in ("pictures/attention", "pictures/pca"):
            trainer = SimpleNamespace(loggers=[logger], global_step=step)
            keep_picture(trainer, Path("resumed", f"{key}_{step}.png"), key, Image.new("RGB", (step, 4)))
    logger.experiment.finish()
"""


def wandb_pictures(folder, key):
    """(step, picture) of all that the runs in a folder recorded under a key."""
    found = []
    for path in sorted(Path(folder).rglob("run-*.wandb")):
        for row in read_wandb(path)[0]:
            for name in row.get(f"{key}/filenames", []):
                found.append((row["trainer/global_step"], np.asarray(Image.open(path.parent / "files" / name))))
    return found


@pytest.mark.slow
def test_wandb_records_the_pictures_and_once_across_a_resume(tmp_path, image_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    # W&B's service of an earlier test lives in another folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SERVICE")}
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("attention", "pca"):
        recorded = wandb_pictures("runs", f"pictures/{name}")
        assert [step for step, _ in recorded] == [0, 6]
        for step, picture in recorded:
            (file,) = Path("runs").rglob(f"{name}_{step:07d}.png")
            assert np.array_equal(picture, np.asarray(Image.open(file)))
        again = wandb_pictures("resumed", f"pictures/{name}")
        assert [(step, picture.shape) for step, picture in again] == [(step, (4, step, 3)) for step in (3, 6, 9)]


def test_tensorboard_records_the_pictures_and_csv_takes_none(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    loggers = [CSVLogger(tmp_path, version="csv"), TensorBoardLogger(tmp_path, version="tensorboard")]
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, logger=loggers,
        callbacks=[AttentionMaps(), SceneReport(bank=16, queries=2, k=3)],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    views = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1, "batch_size": 4, "num_workers": 0}
    data = MultiCropDataModule(dataset=Scenes(16, side=32), **views)
    trainer.fit(DINOModule(vit, out_dim=64, hidden_dim=32, warmup_epochs=0, freeze_last_layer=0), data)
    (events,) = tmp_path.rglob("events.out.*")
    recorded = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    for name, steps in (("attention", [0, 2]), ("pca", [0, 2]), ("before_after", [2])):
        images = recorded.Images(f"pictures/{name}")
        assert [image.step for image in images] == steps
        for image in images:
            (file,) = (path for path in tmp_path.rglob(f"{name}*.png") if len(steps) == 1 or f"{image.step:07d}" in path.name)
            picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
            assert np.array_equal(picture, np.asarray(Image.open(file)))
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "train/loss" in metrics.read_text() and "pictures" not in metrics.read_text()
