"""--config auto: what it chooses, that the user's word stands, and that the run is the one it says."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import two_colours

from dino_lightning import auto
from dino_lightning.__main__ import main
from dino_lightning.auto.choices import length, settings
from dino_lightning.auto.facts import Facts, look
from dino_lightning.cli import DINOCLI
from dino_lightning.door.errors import UsageError
from dino_lightning.methods import METHODS

CIFAR = Facts(images=50_000, bank=50_000, queries=10_000, side=32, gpu=None, memory=0, devices=1, half=False)
PHOTOS = Facts(images=3_068, bank=3_068, queries=341, side=400, gpu=None, memory=0, devices=1, half=False)
MILLION = Facts(
    images=1_281_167, bank=50_000, queries=50_000, side=375, gpu="NVIDIA H100 80GB HBM3", memory=80 * 2**30, devices=8, half=True
)


def chosen(facts, method="dino", said=None, minutes=60, pace=200.0):
    _, choices = settings(facts, {"method": method} | (said or {}))
    length(choices, facts, minutes, pace)
    return {option: value for option, value, _ in choices}


def validated(found):
    """The epochs after which a run is validated."""
    every = found["trainer.check_val_every_n_epoch"]
    return [epoch for epoch in range(1, found["trainer.max_epochs"] + 1) if epoch % every == 0]


def test_settings_follow_images_and_device():
    cifar, photos, million = chosen(CIFAR), chosen(PHOTOS), chosen(MILLION, pace=8000.0)
    assert [found["data.global_crops_size"] for found in (cifar, photos, million)] == [32, 64, 224]
    assert [found["model.out_dim"] for found in (cifar, photos, million)] == [4096, 256, 65_536]
    assert million["model.backbone"] == "vit_small" and million["trainer.precision"] == "bf16-mixed"
    assert "data.local_crops_number" not in million and cifar["data.local_crops_number"] == 0
    assert cifar["model.backbone"]["init_args"]["stem_stride"] == 2 and photos["model.backbone"]["init_args"]["stem_stride"] == 4
    assert "data.blur_p" in cifar and "data.blur_p" not in photos
    for minutes, stride in ((10, 2), (60, 1)):  # enough to see each image four times at 10 ms, or not
        _, choices = settings(CIFAR, {"method": "simclr"}, 60 * minutes)
        assert choices.of("model.backbone")["init_args"] == {"stem_stride": stride, "grid": 2}
    few = chosen(CIFAR._replace(images=100))
    assert few["data.batch_size"] == 8 and few["model.out_dim"] == 64 and chosen(CIFAR._replace(images=3))["data.batch_size"] == 2
    tiny_imagenet, scans = chosen(MILLION._replace(side=64)), chosen(MILLION._replace(side=150))
    assert tiny_imagenet["data.local_crops_number"] == 0 and tiny_imagenet["model.backbone"]["init_args"] == {"stem_stride": 2}
    assert (scans["data.global_crops_size"], scans["data.local_crops_size"]) == (144, 48)
    assert chosen(MILLION, "simclr")["model.optimizer"] == "adamw", "LARS is not for these batches"


def test_methods_differ_in_what_is_theirs_alone():
    found = {method: chosen(CIFAR, method) for method in METHODS}
    assert found.keys() == {"dino", "dinov2", "simclr", "byol", "moco_v3", "mae"}
    shared = [option for option in found["dino"] if option.startswith("data.")] + [
        "model.optimizer",
        "model.weight_decay",
        "model.img_size",
    ]
    for method in found.keys() - {"mae"}:
        assert all(found[method][option] == found["dino"][option] for option in [*shared, "model.backbone"]), method
    assert found["mae"]["model.backbone"]["class_path"] == "dino_lightning.VisionTransformer"
    assert found["dinov2"]["model.ibot_loss_weight"] == 0.0
    assert "model.ibot_loss_weight" not in chosen(CIFAR, "dinov2", {"model.backbone": "vit_tiny"})


def test_a_cpu_trains_what_learns_soonest_unless_the_user_says():
    asked = {
        "cpu": (CIFAR, {}),
        "gpu": (MILLION, {}),
        "said": (CIFAR, {"method": "dino"}),
        "an option": (CIFAR, {"model.teacher_temp": 0.03}),
    }
    found = {name: settings(facts, said) for name, (facts, said) in asked.items()}
    assert {name: method for name, (method, _) in found.items()} == {"cpu": "simclr", "gpu": "dino", "said": "dino", "an option": "dino"}
    assert found["cpu"][1][0].option == "method" and "model.out_dim" not in {choice.option for choice in found["cpu"][1]}


@pytest.mark.parametrize("said", [{}, {"trainer.limit_train_batches": "10"}, {"trainer.limit_train_batches": "0.5"},
                                  {"trainer.accumulate_grad_batches": "4"}, {"trainer.check_val_every_n_epoch": "5"},
                                  {"trainer.limit_val_batches": "0"}])  # fmt: skip
@pytest.mark.parametrize(
    "facts, minutes, pace", [(CIFAR, 60, 200.0), (CIFAR, 20, 100.0), (PHOTOS, 60, 200.0), (CIFAR, 5, 100.0), (MILLION, 6000, 9000.0)]
)
def test_a_run_takes_the_time_that_it_has(facts, minutes, pace, said):
    found = chosen(facts, minutes=minutes, pace=pace, said=said) | {name: yaml.safe_load(value) for name, value in said.items()}
    accumulated = found.get("trainer.accumulate_grad_batches", 1)
    batches = facts.images // (found["data.batch_size"] * facts.devices)
    limit = found.get("trainer.limit_train_batches", 1.0)
    batches = int(limit * batches) if isinstance(limit, float) else limit
    images = found["trainer.max_epochs"] * (batches // accumulated) * accumulated * found["data.batch_size"] * facts.devices
    evaluated = min(facts.bank, found.get("data.max_bank", 50_000)) + facts.queries
    times = 0
    if "trainer.limit_val_batches" not in said:
        times = len(validated(found)) + ("trainer.num_sanity_val_steps" not in found)
        at_the_end = validated(found)[-1] == found["trainer.max_epochs"]
        assert at_the_end or "trainer.check_val_every_n_epoch" in said
    seconds = images / pace + times * evaluated / (6 * pace)
    assert 0.8 * 60 * minutes < seconds < 1.2 * 60 * minutes
    assert found["model.warmup_epochs"] <= max(1, found["trainer.max_epochs"] / 10)
    assert 1 <= found["trainer.log_every_n_steps"] <= batches // accumulated, "each epoch has a line"


def test_what_the_user_said_stands_and_the_rest_follows_it():
    found = chosen(CIFAR, said={"data.batch_size": "64", "data.global_crops_size": "48", "model.lr": 1.0, "model.backbone": "vit_tiny"})
    assert not found.keys() & {"data.batch_size", "data.global_crops_size", "model.lr", "model.backbone"}
    assert found["model.img_size"] == 48
    twice = chosen(CIFAR, said={"data.batch_size": "256"})
    assert twice["trainer.limit_train_batches"] * 2 == pytest.approx(chosen(CIFAR)["trainer.limit_train_batches"], rel=0.05)


def test_batches_fit_the_memory_of_a_gpu(tmp_path, monkeypatch):
    root = str(two_colours(tmp_path / "images", counts=(400, 4)))
    small = Facts(images=800, bank=0, queries=0, side=224, gpu="a GPU", memory=2 * 2**30, devices=1, half=False)
    monkeypatch.setattr(auto, "look", lambda data, trainer: small)
    args, table = auto.in_place(["fit", "--config", "auto", "--data.root", root, "--trainer.max_epochs", "1"])
    found = yaml.safe_load(args[2])
    assert found["data"]["batch_size"] * found["trainer"]["accumulate_grad_batches"] == 64 and found["data"]["batch_size"] in (4, 8)
    assert "would fill 2 GiB to four fifths" in table
    monkeypatch.setattr(auto, "look", lambda data, trainer: small._replace(memory=80 * 2**30))
    args, _ = auto.in_place(["fit", "--config", "auto", "--data.root", root, "--trainer.max_epochs", "1"])
    assert yaml.safe_load(args[2])["data"]["batch_size"] == 64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("facts", [CIFAR, PHOTOS, MILLION])
def test_every_method_takes_its_settings(method, facts, tmp_path):
    """Parsed and built by the command line, with the crops and the network that were chosen."""
    found = {name: value for name, value in chosen(facts, method).items() if name != "trainer.precision"}
    groups = {}
    for option, value in found.items():
        group, name = option.split(".")
        groups.setdefault(group, {})[name] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(groups))
    cli = DINOCLI(["--method", method, "--config", str(path), "--data.root", "images", "--trainer.accelerator", "cpu"], run=False)
    assert cli.datamodule.multicrop.global_crops_size == (found["data.global_crops_size"],) * 2
    assert cli.trainer.max_epochs == found["trainer.max_epochs"]


def test_facts_of_a_folder(tmp_path):
    root = two_colours(tmp_path / "images")
    facts = look({"root": root}, {"accelerator": "cpu", "devices": "auto", "num_nodes": 1})
    assert (facts.images, facts.bank, facts.queries, facts.gpu, facts.devices) == (16, 16, 8, None, 1) and facts.side == 40


def test_refused(tmp_path, monkeypatch):
    root = str(two_colours(tmp_path / "images"))
    fit = ["fit", "--config", "auto", "--data.root", root]
    with pytest.raises(UsageError, match="add --minutes 60"):
        auto.in_place(fit)
    with pytest.raises(UsageError, match="so does trainer.max_epochs=1"):
        auto.in_place([*fit, "--minutes=3", "--trainer.max_epochs", "1"])
    for wrong in ("-5", "1h", "nan"):
        with pytest.raises(UsageError, match=f"a number above 0, got '{wrong}'"):
            auto.in_place([*fit, "--minutes", wrong])
    with pytest.raises(UsageError, match="--print_config > run.yaml"):
        auto.in_place([*fit, "--minutes", "3", "--trainer.num_nodes", "2"])
    for name, value in {
        "RANK": 0,
        "GROUP_RANK": 0,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "WORLD_SIZE": 2,
        "TORCHELASTIC_RUN_ID": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match="--print_config > run.yaml"):
        auto.in_place([*fit, "--minutes", "3"])


def test_ranks_take_what_the_first_has_chosen(monkeypatch):
    config = "model:\n  lr: 1.0\n"
    rest = ["fit", "--data.root", "images"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DINO_LIGHTNING_AUTO", json.dumps({"args": rest, "config": config}))
    assert auto.in_place([*rest, "--config", "auto", "--minutes", "3"]) == (["fit", "--config", config, "--data.root", "images"], "")


@pytest.mark.parametrize("args", [
    ["fit", "--config", "small_images", "--data.root=x"], ["fit", "--config=auto", "--help"], ["validate", "--config", "x.yaml"], [],
])  # fmt: skip
def test_arguments_without_auto_stay(args):
    assert auto.in_place(args) == (args, "")


@pytest.mark.parametrize("spelt", [["--config=auto"], ["-c", "auto"], ["--config", "auto"]])
def test_auto_is_found_however_it_is_spelt(spelt, tmp_path):
    root = str(two_colours(tmp_path / "images"))
    Path(root, "train", "a", "0.jpg").write_bytes(b"no image")
    (tmp_path / "mine.yaml").write_text("model: {hidden_dim: 8}\n")
    mine = f"--config={tmp_path / 'mine.yaml'}"
    args, table = auto.in_place(["fit", *spelt, mine, "--data.root", root, "--trainer.max_epochs", "1"])
    assert args[:2] == ["fit", "--config"] and args[3:] == [mine, "--data.root", root, "--trainer.max_epochs", "1"]
    assert "batch_size" in args[2] and "hidden_dim" not in args[2] and table.startswith("auto: 16 images, the shorter side 40")


@pytest.mark.parametrize("args, said", [
    (["validate", "--config", "auto", "--data.root", "."], "auto is for fit; give validate"),
    (["estimate", "--config", "auto"], "auto is for fit; give estimate"),
    (["fit", "--minutes", "3", "--data.root", "."], "--minutes says how long --config auto may"),
])  # fmt: skip
def test_the_door_says_where_it_belongs(args, said, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert said in capsys.readouterr().err


def test_a_run_by_auto_keeps_its_choices_and_goes_on_with_them(tmp_path, monkeypatch, capsys):
    root = str(two_colours(tmp_path / "images"))
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", "auto", "--data.root", root, "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit):
        main([*fit, "--model.out_dim", "32", "--trainer.max_epochs", "1", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["batch_size"] == 2 and printed["model"]["out_dim"] == 32
    main([*fit, "--model.out_dim", "32", "--trainer.max_epochs", "1"])
    said = capsys.readouterr().err
    assert "auto: 16 images" in said and "data.batch_size" in said and "model.out_dim" not in said
    text = Path("lightning_logs/version_0/config.yaml").read_text()
    assert text.startswith("# auto: 16 images") and "#   data.batch_size" in text
    config = yaml.safe_load(text)
    assert (config["data"]["batch_size"], config["model"]["out_dim"], config["trainer"]["max_epochs"]) == (2, 32, 1)
    main([*fit, "--minutes", "9", "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    assert "done         16 steps" in capsys.readouterr().out
    assert Path("lightning_logs/version_0/config.yaml").read_text().startswith("# auto: 16 images"), "the table stays"
    Path("lightning_logs/version_0/config.yaml").unlink()
    with pytest.raises(SystemExit):
        main([*fit, "--ckpt_path", "last"])
    assert "a run that goes on keeps its settings, but there is no" in capsys.readouterr().err


@pytest.mark.slow
def test_why_a_trial_failed_is_told(tmp_path, capsys):
    root = two_colours(tmp_path / "images")
    bad = sorted(root.rglob("*.jpg"))[0]
    bad.write_text("no image")
    options = "--config auto --minutes 1 --data.num_workers 0 --trainer.accelerator cpu".split()
    with pytest.raises(SystemExit):
        main(["fit", *options, "--data.root", str(root)])
    assert re.search(rf"its trial ended: \d of \d+ images could not be read, .*\n{bad}: ", capsys.readouterr().err)
