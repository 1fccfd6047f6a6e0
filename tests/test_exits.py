"""However a process ends, its workers end within seconds, and what was trained is kept."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_images, write_labelled
from exit_paths import ENDS

CODES = {
    "script end": 0, "script exception": 1, "callback exception": 1, "on_exception": 1, "full disk, TensorBoard": 1,
    "full disk, checkpoint": 1, "full disk, log": 1, "SIGTERM to a script": -15, "SIGKILL to a script": -9, "SIGTERM": 143, "SIGINT": 130,
    "SIGINT twice": 1, "SIGTERM in validation": 143, "SIGKILL": -9,
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """All ends, and the folder in which they were."""
    folder = tmp_path_factory.mktemp("ends")
    write_images(folder / "images", 24)
    (write_labelled(folder / "two") / "images").rename(folder / "labelled")
    command = [sys.executable, str(Path(__file__).parent / "exit_paths.py"), str(folder), *ENDS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def state(folder, name):
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_every_end_is_an_end(ends, name):
    seen = ends[1][name]
    assert seen["code"] == CODES.get(name, 0), seen["said"]
    assert seen["left"] == 0 and seen["seconds"] < 20, seen


@pytest.mark.slow
def test_a_signal_saves_and_the_second_ctrl_c_does_not_wait(ends):
    folder, seen = ends
    for name in ("SIGTERM", "SIGINT"):
        assert f"{name}: saving" in seen[name]["said"] and state(folder, name)["global_step"] >= 6
    assert "once more leaves at once" in seen["SIGINT"]["said"]
    assert not (folder / "SIGINT twice" / "checkpoints").exists(), "its step would have taken a minute"


@pytest.mark.slow
def test_a_full_disk_is_named_with_the_room_it_needs(ends):
    said = ends[1]["full disk, checkpoint"]["said"]
    assert "DiskFullError: no room for the checkpoint" in said and "it needs about 1 MiB" in said and "MiB left" in said
    assert "DiskFullError: no room for the log" in ends[1]["full disk, log"]["said"]
    said = ends[1]["full disk, pictures"]["said"]  # the run goes on
    assert "no picture" in said and "File too large" in said and not list((ends[0] / "full disk, pictures").rglob("pictures/*0000018.png"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [("SIGKILL", "whole"), ("SIGTERM in validation", "whole, labelled")])
def test_a_run_that_goes_on_ends_as_one_that_was_left_alone(ends, name, whole):
    """Killed within an epoch behind a checkpoint by the clock; and stopped in a validation, with which it then begins."""
    folder, _ = ends
    resumed, whole_state = state(folder, name), state(folder, whole)
    assert resumed["global_step"] == whole_state["global_step"]
    assert all(torch.equal(value, whole_state["state_dict"][key]) for key, value in resumed["state_dict"].items())
    assert val_progress(resumed) == val_progress(whole_state), "and no validation is left to do"
    assert names(folder / name / "best") == names(folder / whole / "best")
    if name == "SIGTERM in validation":
        assert rows(folder / name) == rows(folder / whole)


def val_progress(state):
    return state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]


def names(folder):
    return {path.name for path in folder.glob("*.ckpt")}


def rows(folder):
    with open(folder / "log" / "metrics.csv") as file:
        return [(row["step"], row["train/loss"], row["val/knn_top1"]) for row in csv.DictReader(file)]
