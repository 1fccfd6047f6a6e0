"""A run that was interrupted after any step and resumed ends as the run that was not."""

import pytest
import torch
from conftest import write_images
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from two_ranks import train


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 2 epochs of 5 batches with drop path, and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("resume")
    write_images(folder / "images", 22)
    every_step = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return folder, run(folder, callbacks=[every_step], enable_checkpointing=True)


def run(folder, **options):
    return train(folder, batch_size=4, devices=1, drop_path_rate=0.3, **options)


@pytest.mark.parametrize("step, num_workers", [(1, 0), (3, 2), (5, 0), (7, 0)])
def test_resumed_after_any_step(whole_run, step, num_workers):
    folder, whole = whole_run
    resumed = run(folder, ckpt_path=folder / f"step={step}.ckpt", num_workers=num_workers)
    assert resumed["losses"] == whole["losses"][step:]
    for key, value in whole["state"].items():
        assert torch.equal(resumed["state"][key], value), key


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


def test_checkpoints_within_accumulated_batches_are_refused(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split / "a", 12)
        write_images(tmp_path / "images" / split / "b", 4, first=20)
    with pytest.raises(ValueError, match="val_check_interval=3 and epochs of 8 batches .* set val_check_interval to a multiple of 2"):
        train(tmp_path, batch_size=2, devices=1, accumulate_grad_batches=2, val_check_interval=3)
    train(tmp_path, batch_size=2, devices=1, accumulate_grad_batches=2, val_check_interval=4)


def test_a_resumed_run_saves_no_step_twice(tmp_path):
    """Lightning would save again with the first of the accumulated batches, which is not where the step ended."""

    def checkpoints(folder):
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    write_images(tmp_path / "images", 24)
    options = dict(batch_size=2, devices=1, accumulate_grad_batches=2, drop_path_rate=0.3, enable_checkpointing=True)
    whole = train(tmp_path, callbacks=[checkpoints(tmp_path / "first")], **options)
    resumed = train(
        tmp_path, callbacks=[checkpoints(tmp_path / "second")], ckpt_path=tmp_path / "first/step=4.ckpt", **options
    )
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == sorted(f"step={i}.ckpt" for i in range(5, 13))
    for key, value in whole["state"].items():
        assert torch.equal(resumed["state"][key], value), key
