"""The command line: help, recipes, configs that round-trip, resuming, run folders, W&B."""

import csv
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import two_colours, write_images
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

import dino_lightning
from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer, recipes
from dino_lightning.backbones import build
from dino_lightning.cli import DINOCLI, main
from dino_lightning.data import ImageFolder
from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.features import extract_features
from dino_lightning.methods import METHODS
from dino_lightning.tools import knn

SMALL = """
data: {batch_size: 4, num_workers: 0, global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
model:
  backbone:
    class_path: dino_lightning.VisionTransformer
    init_args: {img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}
  out_dim: 64
  hidden_dim: 32
  warmup_epochs: 1
trainer: {accelerator: cpu, devices: 1, max_epochs: 2, enable_model_summary: false, log_every_n_steps: 1}
"""


@pytest.fixture
def run_dir(tmp_path, image_folder, monkeypatch):
    """A folder to run in, with small.yaml, and images/ of 24 photographs."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    return tmp_path


def fit(*args):
    main(["fit", "--config", "small.yaml", "--data.root", "images", *args])


def printed(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert not stop.value.code
    return capsys.readouterr().out


def test_help_lists_commands_and_recipes(capsys):
    text = printed(capsys, "--help")
    for word in ("fit", "validate", "test", "predict", "knn", "recipes for --config", *recipes.names()):
        assert word in text
    assert printed(capsys) == text, "no arguments give the help"


@pytest.mark.parametrize("method", METHODS)
def test_help_explains_every_option(method):
    cli = DINOCLI(["--method", method, "--data.root", "images"] + ["--model.backbone", "vit_tiny"], run=False)
    unexplained = [
        action.dest
        for action in cli.parser._actions
        if action.dest.startswith(("model.", "data.")) and not (action.help or "").replace("%(default)s", "").strip(" ()")
    ]
    explained = [action.dest for action in cli.parser._actions if action.dest.startswith(("model.", "data."))]
    assert not unexplained and len(explained) > 40


@pytest.mark.parametrize("recipe", recipes.names())
def test_recipes_parse_and_say_what_they_reach(recipe, capsys):
    text = printed(capsys, "fit", "--config", recipe, "--data.root", "images", "--print_config")
    assert yaml.safe_load(text)["data"]["root"] == "images"
    assert (recipes.folder() / f"{recipe}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("recipe", recipes.names())
def test_recipes_train_what_they_say(recipe, run_dir, monkeypatch):
    """Built without memory: the networks take the recipe's crops, and its warm-ups fit into its epochs."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TORCH_HOME", str(run_dir / "cache"))
    if recipe.endswith("warm_start"):
        file, name = (
            ("dinov2_vits14_pretrain.pth", "dinov2_vits14") if "dinov2" in recipe else ("dino_deitsmall16_pretrain.pth", "vit_small")
        )
        published = run_dir / "cache" / "hub" / "checkpoints" / file
        published.parent.mkdir(parents=True)
        torch.save(build(name, img_size=518 if "dinov2" in recipe else 224).state_dict(), published)
    own_data = recipe.endswith("quickstart")
    with torch.device("meta"):
        cli = DINOCLI(args=["--config", recipe, *([] if own_data else ["--data.root", "images"])], run=False)
        crops = cli.datamodule.multicrop
        sizes = [crops.global_crops_size] * 2 + [crops.local_crops_size] * crops.local_crops_number
        trained = cli.model.trained
        head = trained.dino_head if cli.model.method == "dinov2" else trained.head
        outputs = head(trained.embed([torch.zeros(2, 3, *size) for size in sizes]))
    options = cli.model.options
    assert outputs.shape == (2 * len(sizes), options.get("out_dim") or options["projection_dim"])
    epochs = cli.trainer.max_epochs
    assert epochs > options["warmup_epochs"] and epochs > options.get("warmup_teacher_temp_epochs", 0)


def test_unknown_recipe_is_named():
    with pytest.raises(FileNotFoundError, match="'vit_smal' and no recipe.*vit_small"):
        main(["fit", "--config", "vit_smal"])


def test_print_config_round_trips(run_dir, capsys):
    first = printed(capsys, "fit", "--config", "small.yaml", "--data.root", "images", "--model.lr", "0.25", "--print_config")
    Path("again.yaml").write_text(first)
    assert printed(capsys, "fit", "--config", "again.yaml", "--print_config") == first
    assert yaml.safe_load(first)["model"]["lr"] == 0.25


def test_fit_writes_into_its_run_folder_only(run_dir):
    fit("--trainer.default_root_dir", "runs")
    written = {str(path.relative_to("runs/lightning_logs/version_0")) for path in Path("runs").rglob("*") if path.is_file()}
    assert {"config.yaml", "checkpoints/last.ckpt"} <= written and sum(name.endswith(".ckpt") for name in written) == 1
    assert {path.name for path in Path().iterdir()} == {"images", "small.yaml", "runs"}
    fit("--config", "runs/lightning_logs/version_0/config.yaml", "--trainer.max_epochs", "1")
    config = yaml.safe_load(Path("runs/lightning_logs/version_1/config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1 and config["model"]["out_dim"] == 64


def test_second_run_in_the_same_folder(run_dir):
    for _ in range(2):
        fit("--trainer.logger", "false")
    assert Path("config.yaml").exists() and Path("checkpoints/last.ckpt").exists()


def test_checkpointing_can_be_switched_off_or_be_the_users(run_dir):
    fit("--trainer.enable_checkpointing", "false")
    assert not list(Path().rglob("*.ckpt"))
    fit("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=mine")
    assert [str(path.parent) for path in Path().rglob("*.ckpt")] == ["mine"]


def load(path):
    return torch.load(path, weights_only=True)


def test_resume_goes_on_and_explicit_arguments_win(run_dir):
    fit("--trainer.max_epochs", "3", "--model.lr", "0.25", "--model.center_momentum", "0.8")
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert load(checkpoint)["hyper_parameters"]["lr"] == 0.25
    fit("--trainer.max_epochs", "4", "--ckpt_path", checkpoint, "--model.lr", "0.5")
    resumed = load("lightning_logs/version_1/checkpoints/last.ckpt")
    assert (resumed["epoch"], resumed["global_step"]) == (3, 24)
    assert resumed["hyper_parameters"]["lr"] == 0.5, "the command line wins"
    assert resumed["hyper_parameters"]["center_momentum"] == 0.8, "what it leaves open comes from the checkpoint"
    assert resumed["hyper_parameters"]["warmup_epochs"] == 1


def test_resume_from_the_last_checkpoint(run_dir):
    with pytest.raises(FileNotFoundError, match="--ckpt_path last: there is no last.ckpt below"):
        fit("--ckpt_path", "last")
    fit("--trainer.max_epochs", "1", "--trainer.default_root_dir", "runs")
    fit("--trainer.max_epochs", "2", "--trainer.default_root_dir", "runs", "--ckpt_path", "last")
    assert load("runs/lightning_logs/version_0/checkpoints/last.ckpt")["global_step"] == 12
    assert not Path("runs/lightning_logs/version_1").exists(), "it goes on in its folder"
    elsewhere = ("--trainer.default_root_dir", "other", "--checkpoint.dirpath", "kept")
    fit("--trainer.max_epochs", "1", *elsewhere)
    fit("--trainer.max_epochs", "2", *elsewhere, "--ckpt_path", "last")
    assert max(load(path)["global_step"] for path in Path("kept").glob("last*.ckpt")) == 12


def test_a_resumed_run_goes_on_in_its_folder(run_dir, caplog, capsys):
    """Its log and its best score too; and says what another length does to the schedules."""
    root = two_colours(run_dir / "labelled")
    options = ("--data.root", "labelled", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs",
               "--trainer.default_root_dir", "runs")  # fmt: skip
    fit(*options)
    said = capsys.readouterr().out
    assert "16 in 2 classes (a, b) in labelled; val asked" in said and "run folder" in said
    assert re.search(r"k-NN top-1 +[\d.]+ %; [\d.]+ % before the first step", said) and "dino-lightning knn --root labelled" in said
    assert re.search(r"\ndoctor       too short a run to tell; spread of the features 0\.\d\d .*, effective rank in a batch \d", said)
    run = Path("runs/lightning_logs/version_0")
    before, config = (run / "metrics.csv").read_text().splitlines(), yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["root"] == str(root) and config["trainer"]["default_root_dir"] == str(run_dir / "runs")
    best = next(state for name, state in load(run / "checkpoints/last.ckpt")["callbacks"].items() if "knn_top1" in name)
    (run / "checkpoints/.last.ckpt.abc.partial").write_text("of a process that was killed")
    fit(*options, "--trainer.max_epochs", "3", "--ckpt_path", "last")
    assert [path.name for path in Path("runs/lightning_logs").iterdir()] == ["version_0"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert (run / "metrics.csv").read_text().splitlines()[: len(before)] == before
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(12))
    assert "resumed for 12 steps in all; before, there were 8" in caplog.text
    after = next(state for name, state in load(run / "checkpoints/last.ckpt")["callbacks"].items() if "knn_top1" in name)
    assert after["best_model_score"] >= best["best_model_score"] and len(list(run.rglob("*.ckpt"))) == 2
    assert not list(run.rglob(".*.partial")), "what was left of it is swept"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["ckpt_path"] is None and config["trainer"]["num_sanity_val_steps"] == -1, "its options begin a new run"
    fit(*options, "--trainer.max_epochs", "3", "--ckpt_path", "last")  # there is nothing left to do
    assert list(csv.DictReader((run / "metrics.csv").open())) == rows
    assert "done         12 steps, as before: nothing was left to train\n" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if not name.endswith(("quickstart", "wandb", "warm_start"))])
@pytest.mark.parametrize("channels", [1, 5])
def test_recipes_take_images_of_any_channels(recipe, channels):
    with torch.device("meta"):
        cli = DINOCLI(args=["--config", recipe, "--data.root", "images", "--data.in_chans", str(channels)], run=False)
        height, width = cli.datamodule.multicrop.global_crops_size
        features = cli.model.evaluated.backbone(torch.zeros(2, channels, height, width))
    assert len(features) == 2 and cli.datamodule.in_chans == cli.model.options["in_chans"] == channels


def test_a_backbone_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="init_args.in_chans is 4, but data.in_chans 5; give data.in_chans alone"):
        DINOCLI(["--config", "cpu", "--data.root", "images", "--data.in_chans", "5", "--model.backbone.init_args.in_chans", "4"], run=False)


def test_default_warm_ups_fit_and_given_ones_are_refused_before_there_is_a_folder(run_dir, caplog):
    with pytest.raises(ValueError, match="warmup_epochs=10 is longer than the run of max_epochs=2"):
        fit("--model.warmup_epochs", "10")
    assert {path.name for path in Path().iterdir()} == {"images", "small.yaml"}
    Path("small.yaml").write_text(SMALL.replace("  warmup_epochs: 1\n", ""))
    for options in ((), ("--config", "lightning_logs/version_0/config.yaml"), ("--ckpt_path", "last", "--trainer.max_epochs", "3")):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit("--trainer.log_every_n_steps", "1", *options)
        assert "warmup_epochs: the default of 10 is more than half of the run; a tenth of it, 1 steps" in caplog.text


def test_every_epoch_is_saved_however_seldom_it_is_validated(run_dir):
    fit("--trainer.check_val_every_n_epoch", "5", "--trainer.max_epochs", "1", "--trainer.logger", "false")
    assert load("checkpoints/last.ckpt")["global_step"] == 6
    root = str(two_colours(run_dir / "labelled"))
    fit("--data.root", root, "--trainer.max_epochs=-1", "--trainer.max_steps", "5", "--trainer.default_root_dir", "runs",
        "--trainer.precision", "64-true")  # fmt: skip
    assert load("runs/lightning_logs/version_0/checkpoints/last.ckpt")["global_step"] == 5, "a run that is planned in steps"


def test_what_cannot_be_gone_on_with_is_said_at_once(run_dir):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint none.ckpt"):
        fit("--ckpt_path", "none.ckpt")
    with pytest.raises(ValueError, match="0000.jpg is no checkpoint, .* it begins like a JPEG image"):
        fit("--ckpt_path", "images/0000.jpg")
    fit("--trainer.max_epochs", "1", "--checkpoint.save_weights_only", "true", "--trainer.logger", "false")
    with pytest.raises(ValueError, match="last.ckpt holds weights only .* begin one with --model.weights"):
        fit("--ckpt_path", "last")
    assert not Path("lightning_logs").exists()


def test_training_in_three_lines(run_dir):
    module = dino_lightning.train(
        "images", output="runs", recipe="small.yaml", options=["--trainer.max_epochs=1", "--checkpoint_every=0.0001"]
    )
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 24) and not module.training
    assert [path.name for path in Path("runs/lightning_logs/version_0/checkpoints").iterdir()] == ["last.ckpt"]
    with pytest.raises(ValueError, match="trainer.max_epoch.*did you mean.*trainer.max_epochs"):
        dino_lightning.train("images", recipe="small.yaml", options=["--trainer.max_epoch=1"])


def test_checkpoints_know_their_images(run_dir, capsys):
    """One rule: predict, extract and the rest show a network what it was trained on."""
    fit("--trainer.max_epochs", "1", "--data.in_chans", "1", "--data.mean", "[0.4]", "--data.global_crops_size", "40",
        "--data.local_crops_number", "0")  # fmt: skip
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert load(checkpoint)["images"] == {"size": [40, 40], "mean": [0.4], "std": [0.5]}
    capsys.readouterr()
    main(["predict", "--data.root", "images", "--data.batch_size", "4", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
          "--trainer.default_root_dir", "predicted", "--ckpt_path", checkpoint])  # fmt: skip
    folder = Path("predicted/lightning_logs/version_0").resolve()
    assert f"24 features written to {folder}" in capsys.readouterr().out
    main(["extract", "images", "--checkpoint", checkpoint])
    np.testing.assert_allclose(np.load(folder / "features.npy"), np.load("features/features.npy"), rtol=1e-4, atol=1e-5)
    facts = json.loads(Path("features/features.json").read_text())
    assert facts["size"] == [40, 40] and facts["mean"] == [0.4]


def test_checkpoint_of_the_command_line_keeps_the_class_path(run_dir):
    fit("--trainer.max_epochs", "1")
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    loaded = DINOModule.load_from_checkpoint(path)
    assert loaded.student.backbone.embed_dim == 24
    assert all(torch.equal(value, load(path)["state_dict"][key]) for key, value in loaded.state_dict().items())


def test_channels_are_linked_to_the_model(run_dir):
    cli = DINOCLI(["--config", "small.yaml", "--data.root", "images", "--data.in_chans", "1", "--model.backbone", "resnet18"],
                  run=False)  # fmt: skip
    assert cli.model.student.backbone.conv1.in_channels == 1 == cli.datamodule.in_chans


def test_labelled_splits_are_monitored(run_dir, capsys):
    for split, count in (("train", 8), ("val", 4)):
        for i, name in enumerate(("cat", "dog")):
            write_images(Path("labelled") / split / name, count, first=10 * i)
    fit("--data.root", "labelled", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs")
    header = next(Path("runs").rglob("metrics.csv")).read_text().splitlines()[0]
    keys = {"val/knn_top1", "val/rank_me", "train/teacher_entropy", "train/feature_rank", "train/images_per_s", "train/data_wait"}
    assert keys <= set(header.split(","))
    shown = capsys.readouterr().out
    assert "images/s=" in shown and "data wait=" in shown
    best = next(Path("runs").rglob("best-step=*.ckpt"))
    assert load(best)["global_step"] in (4, 8) and (best.parent / "last.ckpt").exists()


def test_predict_writes_features_and_paths(run_dir):
    fit("--trainer.max_epochs", "1")
    (run_dir / "images/0007.jpg").write_text("not an image")
    main(["predict", "--config", "small.yaml", "--data.root", "images", "--trainer.logger", "false",
          "--ckpt_path", "lightning_logs/version_0/checkpoints/last.ckpt"])  # fmt: skip
    features, paths = np.load("features.npy"), Path("paths.txt").read_text().splitlines()
    assert features.shape == (23, 24) and len(paths) == 23 and paths[0] == str(run_dir / "images/0000.jpg")
    assert not any(path.endswith("0007.jpg") for path in paths), "the unreadable one is left out"


def test_knn_of_a_checkpoint(run_dir, capsys):
    for split, count in (("train", 6), ("validation", 3)):
        for i, name in enumerate(("cat", "dog")):
            write_images(Path("labelled") / split / name, count, first=10 * i)
    fit("--data.root", "labelled", "--trainer.max_epochs", "2", "--trainer.logger", "CSVLogger",
        "--trainer.logger.save_dir", "runs")  # fmt: skip
    logged = next(Path("runs").rglob("metrics.csv")).read_text().splitlines()
    column = logged[0].split(",").index("val/knn_top1")
    last = [row.split(",")[column] for row in logged[1:] if row.split(",")[column]][-1]
    capsys.readouterr()
    main(["knn", "--checkpoint", str(next(Path("runs").rglob("last.ckpt"))), "--root", "labelled", "--k", "[20]",
          "--compare", "true"])  # fmt: skip
    text = capsys.readouterr().out
    trained = re.search(r"^trained +([\d.]+) /", text, flags=re.MULTILINE)
    assert float(trained[1]) == pytest.approx(100 * float(last), abs=0.05), "as during the training"
    assert "raw pixels" in text and "untrained" in text and "12 images" in text


def test_a_probe_beside_the_callbacks_of_the_command_line(run_dir, tmp_path):
    root = two_colours(tmp_path / "labelled")
    fit("--data.root", str(root), "--trainer.callbacks+=dino_lightning.callbacks.OnlineProbe", "--trainer.callbacks.lr=1.0",
        "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs")  # fmt: skip
    with open(next(Path("runs").rglob("metrics.csv"))) as file:
        keys = next(csv.reader(file))
    assert {"train/probe_loss", "val/probe_top1", "val/probe_top5", "val/knn_top1", "train/images_per_s"} <= set(keys)


def test_a_warm_start_says_the_knn_before_the_first_step(run_dir, tmp_path, caplog):
    root = two_colours(tmp_path / "labelled")
    weights = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    torch.save(weights.state_dict(), "weights.pth")
    with caplog.at_level("INFO"):
        fit("--data.root", str(root), "--model.weights", "weights.pth", "--trainer.num_sanity_val_steps", "-1", "--trainer.max_epochs", "2",
            "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--trainer.default_root_dir", "runs")  # fmt: skip
    said = re.search(r"before the first step: k-NN top-1 ([\d.]+) %", caplog.text)
    with open(next(Path("runs").rglob("metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row["val/knn_top1"]]
    assert len(rows) == 3 and rows[0]["step"] == "0"
    assert float(rows[0]["val/knn_top1"]) == pytest.approx(float(said[1]) / 100, abs=1e-3)
    bank, queries = (extract_features(weights.eval(), ImageFolder(root / split), size=(32, 32)) for split in ("train", "val"))
    assert float(rows[0]["val/knn_top1"]) == pytest.approx(knn_accuracy(*bank, *queries)[0]), "of the weights as they came"
    Path("weights.pth").unlink()  # a resumed run does not need them
    fit("--data.root", str(root), "--model.weights", "weights.pth", "--trainer.max_epochs", "3", "--trainer.logger", "false",
        "--trainer.default_root_dir", "runs", "--ckpt_path", "last")  # fmt: skip
    checkpoint = str(next(Path("runs").rglob("last.ckpt")))
    main(["knn", "--checkpoint", checkpoint, "--root", str(root), "--k", "[3]"])


def test_numbers_behind_an_option_of_several_are_its_list(small_checkpoint, tmp_path, capsys):
    root, command = str(two_colours(tmp_path)), ["knn", "--checkpoint", small_checkpoint, "--root"]
    for numbers in (["3", "5"], ["[3, 5]"], ["3"]):
        main([*command, root, "--k", *numbers, "--batch_size", "4"])
        assert ("k = 5" in capsys.readouterr().out) == (numbers != ["3"])


def test_knn_leaves_unreadable_images_out(small_checkpoint, tmp_path, caplog):
    root = two_colours(tmp_path)
    expected = knn(small_checkpoint, str(root), k=(3,))
    for split in ("train", "val"):
        (root / split / "b" / "broken.jpg").write_bytes(b"no image")
    assert knn(small_checkpoint, str(root), k=(3,)) == expected
    assert "train/b/broken.jpg" in caplog.text and "val/b/broken.jpg" in caplog.text


def test_knn_of_gray_images_and_of_a_wrong_number_of_means(run_dir, capsys):
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            write_images(Path("labelled") / split / name, 6, first=10 * i)
    fit("--data.root", "labelled", "--data.in_chans", "1", "--model.backbone", "resnet18", "--trainer.max_epochs", "1",
        "--model.img_size", "32", "--trainer.default_root_dir", "runs")  # fmt: skip
    command = ["knn", "--checkpoint", str(next(Path("runs").rglob("last.ckpt"))), "--root", "labelled", "--k", "[5]"]
    capsys.readouterr()
    main([*command, "--mean", "[0.4]", "--std", "[0.2]"])
    assert "32 pixels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mean has 3 values .* in_chans=1"):
        main([*command, "--mean", "[0.4, 0.4, 0.4]"])


def test_knn_names_what_is_missing(run_dir):
    fit("--trainer.max_epochs", "1", "--trainer.default_root_dir", "runs")
    checkpoint = str(next(Path("runs").rglob("last.ckpt")))
    with pytest.raises(FileNotFoundError, match="no folder of queries in images; looked for val, validation, test"):
        main(["knn", "--checkpoint", checkpoint, "--root", "images"])


def test_test_command_reports_knn_on_the_test_split(run_dir, capsys):
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        for i, name in enumerate(("cat", "dog")):
            write_images(Path("labelled") / split / name, count, first=10 * i)
    main(["test", "--config", "small.yaml", "--data.root", "labelled", "--trainer.logger", "false"])
    assert "test/knn_top1" in capsys.readouterr().out


def test_validate_prints_each_number_once(run_dir, capsys, caplog):
    root = two_colours(run_dir / "labelled")
    main(["validate", "--config", "small.yaml", "--data.root", str(root), "--trainer.logger", "false"])
    printed = capsys.readouterr().out
    for name in ("knn_top1", "knn_top5", "rank_me"):
        assert len(re.findall(rf"^val/{name} +[\d.]+$", printed, flags=re.MULTILINE)) == 1 == printed.count(f"val/{name}"), printed
    main(["validate", "--config", "small.yaml", "--data.root", "images", "--trainer.logger", "false"])
    assert "no labelled train/ and val/" in capsys.readouterr().out
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    data = MultiCropDataModule(root, batch_size=4, num_workers=0, global_crops_size=32, local_crops_size=16)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with caplog.at_level("INFO"):
        trainer.validate(DINOModule(vit, out_dim=64, hidden_dim=32), data)
    assert caplog.text.count("dino_lightning.callbacks.OnlineKNN") == 1


def test_plain_lightning_cli_works(run_dir, monkeypatch):
    args = ["fit", "--config", "small.yaml", "--data.root", "images", "--trainer.fast_dev_run", "true"]
    cli = LightningCLI(DINOModule, MultiCropDataModule, args=args)
    assert cli.trainer.global_step == 1


def test_wandb_records_keys_and_config_offline(run_dir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):  # a second run in the same folder must not fail
        main(["fit", "--config", "small.yaml", "--config", "wandb", "--data.root", "images",
              "--trainer.default_root_dir", "runs"])  # fmt: skip
        import wandb

        wandb.finish()
    assert {path.name for path in Path().iterdir()} == {"images", "small.yaml", "runs"}, "nothing outside the root folder"
    recorded = [read_wandb(path) for path in sorted(Path("runs").rglob("run-*.wandb"))]
    assert len(recorded) == 2
    for history, config in recorded:
        keys = {key for row in history for key in row}
        assert {"train/loss", "train/lr", "train/teacher_entropy", "train/kl", "train/momentum"} <= keys
        steps = [row["trainer/global_step"] for row in history if "train/loss" in row]
        assert steps == sorted(set(steps)) and len(steps) == 12
        assert config["model"]["out_dim"] == 64 and config["trainer"]["max_epochs"] == 2
    configs = list(Path("runs").rglob("config.yaml"))
    assert sum((path.parent / "checkpoints/last.ckpt").exists() for path in configs) == 2, "in the run folders"


def test_all_loggers_show_the_same_keys(run_dir, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    kinds = (
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "dino_lightning.training.loggers.WandbLogger",
    )
    # Whole paths: W&B's service of an earlier test lives in another folder.
    loggers = [{"class_path": kind, "init_args": {"save_dir": f"{run_dir}/runs/{kind.split('.')[-1]}"}} for kind in kinds]
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    root = two_colours(run_dir / "labelled")
    fit("--config", "loggers.yaml", "--data.root", str(root), "--trainer.default_root_dir", "runs")
    import wandb

    wandb.finish()
    with open(next(Path("runs/CSVLogger").rglob("metrics.csv"))) as file:
        shown = set(next(csv.reader(file))) - {"epoch", "step"}
    (events,) = Path("runs/TensorBoardLogger").rglob("events.out.*")
    in_tensorboard = set(accumulator.EventAccumulator(str(events)).Reload().Tags()["scalars"])
    history, _ = read_wandb(next(Path("runs/WandbLogger").rglob("run-*.wandb")))
    in_wandb = {key for row in history for key in row if "/" in key and not key.startswith(("trainer/", "pictures/"))}
    assert shown == in_tensorboard - {"epoch", "hp_metric"} == in_wandb
    watched = ("center_norm", "feature_std", "feature_rank", "view_agreement", "grad_norm", "images_per_s", "data_wait", "skipped_steps")
    assert {"val/knn_top1", "val/rank_me", *(f"train/{name}" for name in watched)} <= shown


@pytest.mark.slow
def test_wandb_run_goes_on_after_an_interruption(run_dir, monkeypatch):
    """Killed in the second epoch behind the checkpoint of the first: the steps since then are trained, but not recorded, again."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    script = """
import os, signal, sys
from dino_lightning.callbacks import RunConfig
from dino_lightning.cli import main
def kill(self, trainer, *_):
    if trainer.global_step == 9 and "last" not in sys.argv:
        trainer.loggers[0].experiment.finish()  # what W&B's own process does when it loses ours
        os.kill(os.getpid(), signal.SIGKILL)
RunConfig.on_train_batch_start = kill
main(["fit", "--config", "small.yaml", "--data.root", "images", "--config", "wandb", "--trainer.default_root_dir", "runs",
      "--trainer.max_epochs", "3", *sys.argv[1:]])
"""
    # W&B's service of an earlier test lives in another folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SERVICE")}
    for arguments, code in (([], -9), (["--ckpt_path", "last"], 0)):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**environment, "OMP_NUM_THREADS": "1"})
        assert done.returncode == code, done.stderr
    recorded = {path: read_wandb(path)[0] for path in sorted(Path("runs").rglob("run-*.wandb"))}
    assert len(recorded) == 2 and len({path.name for path in recorded}) == 1, "one run, in two sittings"
    steps = [[row["trainer/global_step"] for row in history if "train/loss" in row] for history in recorded.values()]
    assert sorted(sum(steps, [])) == list(range(18)) and min(map(len, steps)) >= 9
    assert len(list(Path("runs").glob("*/*/checkpoints/last.ckpt"))) == 1, "in one run folder"


def read_wandb(path, seconds=60):
    """(history rows, config) of an offline run, whose end W&B's own process may write a while after the run finished."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, config, ended = [], {}, False
    for data in leveldb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        ended |= record.HasField("exit")
        if record.history.item:
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    if not ended and seconds > 0:
        time.sleep(1)
        return read_wandb(path, seconds - 1)
    return history, config


def leveldb_records(data, block=32768):
    """The records of a LevelDB log behind W&B's header of 7 bytes: blocks of chunks (checksum 4, length 2, kind 1, bytes)."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # the end of a block is padded
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last chunk
            yield whole
            whole = b""


def test_the_sweep_file_has_options_of_ours(run_dir, capsys):
    sweep = yaml.safe_load((recipes.folder() / "sweeps/knn.yaml").read_text())
    assert sweep["metric"] == {"name": "val/knn_top1", "goal": "maximize"}
    chosen = {name: given.get("value", given.get("min", given.get("values", [None])[0])) for name, given in sweep["parameters"].items()}
    command = [part for part in sweep["command"][1:] if part != "${args}"]
    config = yaml.safe_load(printed(capsys, *command, *(f"--{name}={value}" for name, value in chosen.items()), "--print_config"))
    assert config["data"]["root"] == "photos" and config["model"]["lr"] == 1e-4
    assert config["trainer"]["callbacks"] == [
        {"class_path": "dino_lightning.callbacks.CollapseDoctor", "init_args": {"stop": True, "expected_loss": None}}
    ]


def test_no_network_at_import_help_and_fit_and_without_a_key_for_wandb(run_dir):
    """W&B is imported where it is used, and where nobody can be asked for a key, the error says what to do, before the training."""
    code = """
import socket, sys
failure = AssertionError
def refuse(self, address, *rest):
    if not isinstance(address, str):  # local sockets of worker processes are fine
        raise failure(f"the network was used: {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
from dino_lightning.cli import main
try:
    main(["fit", "--help_all"])
except SystemExit:
    pass
main(["fit", "--config", "small.yaml", "--data.root", "images", "--trainer.max_epochs", "1", "--model.backbone", "vit_tiny",
      "--model.img_size", "32", "--model.patch_size", "8"])
assert "wandb" not in sys.modules
failure = OSError  # W&B may try, and find that there is none
main(["fit", "--config", "small.yaml", "--config", "wandb", "--data.root", "images", "--trainer.default_root_dir", "runs"])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
                          env={**environment, "HOME": str(run_dir), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert "--model.out_dim" in done.stdout and Path("lightning_logs/version_0/checkpoints/last.ckpt").exists(), done.stderr
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "LoggerError: W&B does not begin a run: No API key configured" in told, done.stderr
    assert "WANDB_MODE=offline" in told and "wandb login" in told
    assert not list(Path("runs").rglob("*.ckpt"))
