"""What a command goes on with, found where a user says it is."""

import os
import warnings

import pytest
from jsonargparse import Namespace

from dino_lightning import continuation
from dino_lightning.auto.choices import Choices
from dino_lightning.door import commands


def test_folders_of_the_home_and_files_of_a_group(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "runs" / "checkpoints" / "last.ckpt"
    file.touch()
    assert continuation.checkpoint_at("last", "~/runs", None) == str(file) == continuation.checkpoint_at("last", "/nowhere", "~/runs")
    assert continuation.checkpoint_at("~/runs/checkpoints/last.ckpt", None, None) == str(file)
    with pytest.raises(ValueError, match="not at s3://bucket/runs; name the checkpoint"):
        continuation.checkpoint_at("last", "s3://bucket/runs", None)
    (tmp_path / "trainer.yaml").write_text("default_root_dir: ~/runs\n")
    assert commands.said(["--trainer", str(tmp_path / "trainer.yaml")]) == {"trainer.default_root_dir": "~/runs"}


def test_a_resumed_csv_log_keeps_its_options(tmp_path):
    run = tmp_path / "log" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    arguments = Namespace(save_dir=None, name="log", version=None, prefix="mine", flush_logs_every_n_steps=7)
    options = Namespace(logger=Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=arguments))
    continuation.continue_loggers(options, str(run / "checkpoints" / "last.ckpt"), {"global_step": 5, "callbacks": {}})
    assert options.logger.class_path == "dino_lightning.training.loggers.AppendingCSVLogger"
    expected = {
        "save_dir": str(tmp_path),
        "name": "log",
        "version": "version_0",
        "prefix": "mine",
        "flush_logs_every_n_steps": 7,
        "first_step": 5,
    }
    assert options.logger.init_args.as_dict() == expected


def test_texts_that_are_no_yaml_stay_texts():
    assert Choices({"data.root": "[2023] trip", "data.batch_size": "32"}).said == {"data.root": "[2023] trip", "data.batch_size": 32}


@pytest.mark.parametrize("shared", ["True", "False"])
def test_a_store_that_outlives_its_ranks_is_told(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    args = ["fit", "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", "last"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert continuation.restartable(args) == [*args, "--ckpt_path", "null"]
    assert any("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(warning.message) for warning in told) == (shared == "True")


def test_last_is_that_of_a_run_on_the_same_images(tmp_path):
    for at, (name, root) in enumerate({"first": "photos", "second": "others"}.items()):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(f"data: {{root: {tmp_path / root}}}")
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        os.utime(tmp_path / name / "checkpoints" / "last.ckpt", (at, at))
    runs = str(tmp_path)
    assert continuation.find_last(runs, None, f"{tmp_path}/photos/").startswith(f"{runs}/first/")
    assert continuation.find_last(runs, None).startswith(f"{runs}/second/")
    with pytest.warns(UserWarning, match="is of a run on .*others, not on elsewhere"):
        assert continuation.find_last(runs, None, "elsewhere").startswith(f"{runs}/second/")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "last.ckpt").touch()  # kept elsewhere (--checkpoint.dirpath): of which run, its folder does not tell
    assert continuation.find_last(f"{runs}/first", f"{runs}/apart", f"{tmp_path}/photos") == f"{runs}/apart/last.ckpt"
    (tmp_path / "second" / "config.yaml").write_text("data: {root:")
    assert continuation.find_last(f"{runs}/second", None, f"{tmp_path}/photos").startswith(f"{runs}/second/")
