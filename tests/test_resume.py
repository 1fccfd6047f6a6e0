"""A run that was interrupted after any step and resumed ends as the run that was not."""

import csv
import os
import signal
import subprocess
from datetime import timedelta

import pytest
import torch
from conftest import write_images
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from two_ranks import train

from dino_lightning.callbacks import StopOnSignal
from dino_lightning.training.checkpoint_io import _HOST, sweep
from dino_lightning.training.loggers import AppendingCSVLogger


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 2 epochs of 5 batches with drop path, and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("resume")
    write_images(folder / "images", 22)
    return folder, run(folder, callbacks=[every_step(folder)], enable_checkpointing=True)


def run(folder, **options):
    return train(folder, batch_size=4, devices=1, drop_path_rate=0.3, **options)


@pytest.mark.parametrize("step, num_workers", [(1, 0), (3, 2), (5, 0), (7, 0)])
def test_resumed_after_any_step(whole_run, step, num_workers):
    folder, whole = whole_run
    resumed = run(folder, ckpt_path=folder / f"step={step}.ckpt", num_workers=num_workers)
    assert resumed["losses"] == whole["losses"][step:]
    for key, value in whole["state"].items():
        assert torch.equal(resumed["state"][key], value), key


@pytest.mark.parametrize("first, second", [(5, 6), (5, 8), (5, 10), (3, 5), (10, 10)])
def test_resumed_twice(whole_run, tmp_path, first, second):
    """The first time from the last step of an epoch: what is saved after that must have counted the epochs rightly."""
    folder, whole = whole_run
    again = run(folder, callbacks=[every_step(tmp_path)], enable_checkpointing=True, ckpt_path=folder / f"step={first}.ckpt")
    assert again["losses"] == whole["losses"][first:]
    path = (folder if first == second else tmp_path) / f"step={second}.ckpt"
    resumed = run(folder, ckpt_path=path)
    assert resumed["losses"] == whole["losses"][second:]
    assert all(torch.equal(resumed["state"][key], value) for key, value in whole["state"].items())


def resumed_log(folder, tmp_path, checkpoint, **options):
    """The steps and losses that a resumed run logs."""
    logger = CSVLogger(tmp_path)
    run(folder, logger=logger, log_every_n_steps=1, ckpt_path=checkpoint, **options)
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [int(row["step"]) for row in rows], [float(row["train/loss"]) for row in rows]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_the_log_goes_on_with_the_next_step(whole_run, tmp_path, step):
    folder, whole = whole_run
    steps, losses = resumed_log(folder, tmp_path, folder / f"step={step}.ckpt")
    assert steps == list(range(step, 10))
    assert losses == pytest.approx(whole["losses"][step:])


def test_the_log_goes_on_from_a_checkpoint_of_a_validation(tmp_path):
    """Those are saved at another place of Lightning's loop, within an epoch and at its end."""
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split / "a", 8)
        write_images(tmp_path / "images" / split / "b", 8, first=20)
    monitor = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/knn_top1", save_top_k=-1, save_on_train_epoch_end=False)
    whole = run(tmp_path, callbacks=[monitor], val_check_interval=2, enable_checkpointing=True)
    for step in (2, 4, 6):
        steps, losses = resumed_log(tmp_path, tmp_path / str(step), tmp_path / f"step={step}.ckpt", val_check_interval=2)
        assert steps == list(range(step, 8))
        assert losses == pytest.approx(whole["losses"][step:])


def test_what_was_half_written_to_a_log_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,0.5\n1,0.25\n12,0.12,0.125\n1")
    logger = AppendingCSVLogger(tmp_path, "", "", first_step=20)
    logger.log_metrics({"train/loss": 0.0}, 20)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,train/loss", "0,0.5", "1,0.25", "20,0.0"]


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize("step", [2, 7])
def test_resumed_after_a_stop_within_an_epoch(whole_run, tmp_path, step):
    """As max_time and early stopping do: Lightning closes the epoch before it saves."""
    folder, whole = whole_run
    keep = ModelCheckpoint(tmp_path, save_last=True)
    stopped = run(folder, callbacks=[StopAt(step), keep], enable_checkpointing=True)
    assert len(stopped["losses"]) == step
    resumed = run(folder, ckpt_path=tmp_path / "last.ckpt")
    assert resumed["losses"] == whole["losses"][step:]
    for key, value in whole["state"].items():
        assert torch.equal(resumed["state"][key], value), key


def test_resumed_with_other_micro_batches(tmp_path, caplog):
    """The same images a step: the same plan, within an epoch too."""
    write_images(tmp_path / "images", 22)
    one = dict(folder=tmp_path, devices=1, enable_checkpointing=True)
    whole = train(batch_size=4, callbacks=[every_step(tmp_path)], **one)
    resumed = train(batch_size=2, accumulate_grad_batches=2, limit_train_batches=10, ckpt_path=tmp_path / "step=3.ckpt", **one)
    assert "resumed on 1 device(s) with 2 accumulated batches; before, there were 1 and 1" in caplog.text
    assert len(resumed["losses"]) == 14 and len(whole["losses"]) == 10
    torch.testing.assert_close(
        torch.tensor(resumed["losses"]).unflatten(0, (7, 2)).sum(dim=1), torch.tensor(whole["losses"][3:]), rtol=1e-5, atol=0
    )
    for key, value in whole["state"].items():
        if not key.endswith("qkv.bias"):  # the bias of the keys has no gradient but rounding noise
            # Of the tensor: AdamW makes a step of 1e-3 of a single weight's rounding where its gradient is small.
            assert (resumed["state"][key] - value).norm() <= 1e-5 * value.norm(), key


def test_another_plan_on_resume_is_pointed_out(tmp_path, caplog):
    write_images(tmp_path / "images", 22)
    options = dict(folder=tmp_path, devices=1, enable_checkpointing=True)
    train(batch_size=4, callbacks=[every_step(tmp_path)], **options)
    train(batch_size=2, ckpt_path=tmp_path / "step=3.ckpt", **options)
    assert "resumed with 2 images a step and 11 steps an epoch; before, there were 4 and 5" in caplog.text


def test_checkpoints_within_accumulated_batches_are_refused(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split / "a", 12)
        write_images(tmp_path / "images" / split / "b", 4, first=20)
    with pytest.raises(ValueError, match="val_check_interval=3 and epochs of 8 batches .* set val_check_interval to a multiple of 2"):
        train(tmp_path, batch_size=2, devices=1, accumulate_grad_batches=2, val_check_interval=3)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        train(tmp_path, batch_size=2, devices=1, callbacks=[GradientAccumulationScheduler({0: 2})], val_check_interval=3)
    train(tmp_path, batch_size=2, devices=1, accumulate_grad_batches=2, val_check_interval=4)
    by_time = ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1))
    with pytest.raises(ValueError, match="train_time_interval.* use every_n_train_steps"):
        train(tmp_path, batch_size=2, devices=1, accumulate_grad_batches=2, callbacks=[by_time], enable_checkpointing=True)


def test_a_resumed_run_saves_no_step_twice(tmp_path):
    """Lightning would save again with the first of the accumulated batches, which is not where the step ended."""
    write_images(tmp_path / "images", 24)
    options = dict(batch_size=2, devices=1, accumulate_grad_batches=2, drop_path_rate=0.3, enable_checkpointing=True)
    whole = train(tmp_path, callbacks=[every_step(tmp_path / "first")], **options)
    resumed = train(tmp_path, callbacks=[every_step(tmp_path / "second")], ckpt_path=tmp_path / "first/step=4.ckpt", **options)
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == sorted(f"step={i}.ckpt" for i in range(5, 13))
    for key, value in whole["state"].items():
        assert torch.equal(resumed["state"][key], value), key
    scheduled = {**options, "accumulate_grad_batches": 1, "callbacks": [GradientAccumulationScheduler({0: 2, 1: 2})]}
    resumed = train(tmp_path, ckpt_path=tmp_path / "first/step=4.ckpt", **scheduled)
    assert all(torch.equal(resumed["state"][key], value) for key, value in whole["state"].items()), "a constant schedule"


class Terminated(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_signal_is_heeded_where_every_step_ends_an_epoch(tmp_path, labelled):
    for split in ("train", "val") if labelled else ("train",):
        write_images(tmp_path / "images" / split / "a", 5)
        write_images(tmp_path / "images" / split / "b", 2, first=20)
    whole = run(tmp_path, max_epochs=6)
    assert len(whole["losses"]) == 6
    with pytest.raises(SystemExit) as end:
        run(tmp_path, max_epochs=6, callbacks=[Terminated(), StopOnSignal()], default_root_dir=tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    resumed = run(tmp_path, max_epochs=6, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed["losses"] == whole["losses"][3:]
    assert all(torch.equal(resumed["state"][key], value) for key, value in whole["state"].items())


def test_what_another_process_is_writing_is_not_swept(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["true"]) as gone:
        gone.wait()
        for writer in (other.pid, gone.pid, os.getpid()):
            (tmp_path / f".last.ckpt.{writer}@{_HOST}.abc.partial").touch()
        sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f".last.ckpt.{other.pid}@{_HOST}.abc.partial"]
        other.kill()
