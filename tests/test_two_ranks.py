"""Two real processes (gloo) with a MultiCropDataModule."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_images
from lightning.pytorch.callbacks import ModelCheckpoint
from two_ranks import train


def run_on_two(scenario, folder):
    command = [sys.executable, Path(__file__).with_name("two_ranks.py"), scenario, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def folder(tmp_path):
    """Labelled images: 18 to train on, 7 queries, so that neither divides by the ranks and batches."""
    for split, counts in (("train", (11, 7)), ("val", (4, 3))):
        for i, count in enumerate(counts):
            write_images(tmp_path / "images" / split / f"class{i}", count, first=20 * i + (100 if split == "val" else 0))
    return tmp_path


@pytest.mark.parametrize("scenario", ["fit", "accumulate", "uneven", "resume"])
def test_two_ranks_equal_one_process_of_the_whole_batch(folder, scenario):
    saving = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if scenario == "resume" else []
    uneven = scenario == "uneven"
    one = train(
        folder, batch_size=4, devices=1, limit_train_batches=None if uneven else 4, uneven=uneven,
        callbacks=saving, enable_checkpointing=bool(saving),
    )  # fmt: skip
    done = run_on_two(scenario, folder)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"rank{i}.pt") for i in (0, 1)]
    losses = one["losses"][3:] if scenario == "resume" else one["losses"]
    # Lightning has divided the loss of a micro-batch by their number.
    mean_losses = torch.tensor([rank["losses"] for rank in ranks]).unflatten(1, (len(losses), -1)).sum(dim=2).mean(dim=0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=0)
    for key, value in one["state"].items():
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]), key
        if not key.endswith("qkv.bias"):  # the bias of the keys has no gradient but rounding noise
            torch.testing.assert_close(ranks[0]["state"][key], value, rtol=1e-4, atol=2e-6, msg=lambda m: f"{key}: {m}")
    # The k-NN is exact, without duplicates; RankMe is as exact as the features that it decomposes.
    assert "val/knn_top1" in one["metrics"]
    assert ranks[0]["metrics"] == ranks[1]["metrics"], "a checkpoint may monitor them on every rank"
    assert ranks[0]["metrics"] == {**one["metrics"], "val/rank_me": pytest.approx(one["metrics"]["val/rank_me"], rel=1e-5)}
    said = "resumed on 2 device(s) with 1 accumulated batches, before it were 1 and 1" in done.stderr
    assert said == (scenario == "resume")


def test_a_cnn_on_two_ranks_uses_every_parameter(folder):
    """Without find_unused_parameters; that its batch norms are each rank's own is pointed out (on a CPU they must be)."""
    done = run_on_two("cnn", folder)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(folder / f"rank{i}.pt")["state"] for i in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first if "running" not in key)
    assert "set Trainer(sync_batchnorm=True)" in done.stderr


def test_non_finite_loss_on_one_rank_stops_both(folder):
    done = run_on_two("nan", folder)
    assert done.returncode != 0
    assert done.stderr.count("NonFiniteLossError: the loss was not finite at step 2 ") == 2, done.stderr


def test_the_doctor_stops_both_ranks_behind_the_same_step(folder):
    done = run_on_two("sick", folder)
    assert done.returncode == 0, done.stderr
    assert [len(torch.load(folder / f"rank{i}.pt")["losses"]) for i in (0, 1)] == [61, 61]
    assert done.stderr.count("uniform collapse: ") == 1
