"""--config auto: what it chooses, that the user's word stands, and that the run is the one it says."""

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
MILLION = Facts(images=1_281_167, bank=50_000, queries=50_000, side=375, gpu="NVIDIA H100 80GB HBM3", memory=80 * 2**30, devices=8, half=True)


def chosen(facts, method="dino", said={}, minutes=60, pace=200.0):
    _, choices = settings(facts, {"method": method} | said)
    length(choices, facts, method, minutes, pace)
    return {option: value for option, value, _ in choices}


def test_settings_follow_images_and_device():
    cifar, photos, million = chosen(CIFAR), chosen(PHOTOS), chosen(MILLION, pace=8000.0)
    assert [found["data.global_crops_size"] for found in (cifar, photos, million)] == [32, 64, 224]
    assert [found["model.out_dim"] for found in (cifar, photos, million)] == [4096, 256, 65_536]
    assert million["model.backbone"] == "vit_small" and million["trainer.precision"] == "bf16-mixed"
    assert "data.local_crops_number" not in million and cifar["data.local_crops_number"] == 0
    assert cifar["model.backbone"]["init_args"]["stem_stride"] == 2 and photos["model.backbone"]["init_args"]["stem_stride"] == 4
    assert "data.blur_p" in cifar and "data.blur_p" not in photos
    assert all(why for facts in (CIFAR, PHOTOS, MILLION) for _, _, why in settings(facts, {})[1])
    few = chosen(CIFAR._replace(images=100))
    assert few["data.batch_size"] == 8 and few["model.out_dim"] == 64


def test_a_cpu_trains_what_learns_soonest_unless_the_user_says():
    asked = {"cpu": (CIFAR, {}), "gpu": (MILLION, {}), "said": (CIFAR, {"method": "dino"}), "an option": (CIFAR, {"model.teacher_temp": 0.03})}
    found = {name: settings(facts, said) for name, (facts, said) in asked.items()}
    assert {name: method for name, (method, _) in found.items()} == {"cpu": "simclr", "gpu": "dino", "said": "dino", "an option": "dino"}
    assert found["cpu"][1][0].option == "method" and "model.out_dim" not in {choice.option for choice in found["cpu"][1]}


@pytest.mark.parametrize("facts, minutes, pace", [(CIFAR, 60, 200.0), (PHOTOS, 60, 200.0), (CIFAR, 5, 100.0), (MILLION, 6000, 9000.0)])
def test_a_run_takes_the_time_that_it_has(facts, minutes, pace):
    found = chosen(facts, minutes=minutes, pace=pace)
    step = found["data.batch_size"] * facts.devices
    in_epoch = found.get("trainer.limit_train_batches", facts.images // step)
    epochs = found["trainer.max_epochs"]
    evaluated = (min(facts.bank, found.get("data.max_bank", 50_000)) + facts.queries) / (6 * pace)
    before = "trainer.num_sanity_val_steps" not in found
    seconds = epochs * in_epoch * step / pace + (before + epochs // found["trainer.check_val_every_n_epoch"]) * evaluated
    assert 0.85 * 60 * minutes < seconds < 1.15 * 60 * minutes
    assert epochs >= 20 and found["model.warmup_epochs"] <= epochs / 10 and found["model.warmup_teacher_temp_epochs"] < epochs / 2


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
    with pytest.raises(UsageError, match="--minutes and --trainer.max_epochs both say"):
        auto.in_place([*fit, "--minutes=3", "--trainer.max_epochs", "1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--print_config > run.yaml"):
        auto.in_place([*fit, "--minutes", "3"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DINO_LIGHTNING_AUTO", "model:\n  lr: 1.0\n")
    assert auto.in_place([*fit, "--minutes", "3"]) == (["fit", "--config", "model:\n  lr: 1.0\n", "--data.root", root], "")


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
    main([*fit, "--model.out_dim", "32", "--trainer.max_epochs", "1"])
    said = capsys.readouterr().out
    assert "auto: 16 images" in said and "data.batch_size" in said and "model.out_dim" not in said
    text = Path("lightning_logs/version_0/config.yaml").read_text()
    assert text.startswith("# auto: 16 images") and "#   data.batch_size" in text
    config = yaml.safe_load(text)
    assert (config["data"]["batch_size"], config["model"]["out_dim"], config["trainer"]["max_epochs"]) == (8, 32, 1)
    main([*fit, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    assert "done         4 steps" in capsys.readouterr().out
    Path("lightning_logs/version_0/config.yaml").unlink()
    with pytest.raises(SystemExit):
        main([*fit, "--ckpt_path", "last"])
    assert "a run that goes on keeps its settings, but there is no" in capsys.readouterr().err
