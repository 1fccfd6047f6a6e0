"""Runs of the reference that go on here: the golden trajectory, interrupted in the reference's layout."""

import argparse

import numpy as np
import pytest
import torch
from conftest import write_images
from lightning.pytorch.callbacks import ModelCheckpoint
from test_trajectory import RUNS, assert_same_end
from trajectory import Golden, build_loader, build_module, train

from dino_lightning import DINOModule
from dino_lightning.cli import main
from dino_lightning.tools.adopt import lightning_checkpoint
from dino_lightning.training.optim import is_decayed
from dino_lightning.weights.files import read


def in_the_references_layout(checkpoint, module, **flags) -> dict:
    """What the reference would have saved: wrapped names, its numbering of the parameters, options as a Namespace."""
    weights = checkpoint["state_dict"]
    student = {f"module.{name}": weights[f"student.{name}"] for name in module.student.state_dict()}
    trained = [name for name, parameter in module.student.named_parameters() if parameter.requires_grad]
    parameters = dict(module.student.named_parameters())
    order = sorted(trained, key=lambda name: not is_decayed(name, parameters[name]))
    moments = checkpoint["optimizer_states"][0]
    groups = [
        {**group, "lr": np.float64(group["lr"]), "weight_decay": np.float64(group["weight_decay"])} for group in moments["param_groups"]
    ]
    state = {
        i: {k: int(v) if k == "step" else v for k, v in moments["state"][i].items()} for i in range(len(order)) if i in moments["state"]
    }
    return {
        "student": student,
        "teacher": {name: weights[f"teacher.{name}"] for name in module.teacher.state_dict()},
        "optimizer": {"state": state, "param_groups": groups},
        "dino_loss": {"center": weights["loss.center"]},
        "epoch": checkpoint["epoch"] + 1,
        "args": argparse.Namespace(**flags),
        "fp16_scaler": None,
    }


@pytest.mark.parametrize("run", RUNS)
def test_the_golden_run_goes_on_after_its_second_epoch(run, tmp_path):
    golden = Golden(run)
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _ = train(golden, build_loader(golden, batch_size=4), callbacks=[every_epoch])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    held = in_the_references_layout(saved, whole, batch_size_per_gpu=4, seed=0)
    torch.save(held, tmp_path / "checkpoint.pth")
    steps = golden.item("config.niter") if "sgd" in run else None  # AdamW has counted them
    read_again, _ = read(tmp_path / "checkpoint.pth")
    torch.save(lightning_checkpoint(read_again, build_module(golden), steps), tmp_path / "adopted.ckpt")

    resumed, record = train(golden, build_loader(golden, batch_size=4), ckpt_path=tmp_path / "adopted.ckpt")
    torch.testing.assert_close(torch.tensor(record.losses).double(), golden["losses"][2 * golden.item("config.niter") :], rtol=1e-4, atol=0)
    assert_same_end(resumed.state_dict(), golden)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_adopt_and_fit_by_the_command_line(tmp_path, monkeypatch, capsys):
    """A small run of ours in the reference's clothes, so that its flags must become our options."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 8)
    flags = {"arch": "vit_tiny", "patch_size": 16, "out_dim": 32, "norm_last_layer": False, "warmup_epochs": 1, "lr": 0.002,
             "momentum_teacher": 0.9, "optimizer": "adamw", "drop_path_rate": 0.0, "freeze_last_layer": 0}  # fmt: skip
    model = [f"--model.{name if name != 'arch' else 'backbone'}={value}" for name, value in flags.items()]
    small = ["--data.root=images", "--data.batch_size=4", "--data.num_workers=0", "--data.global_crops_size=32", "--model.img_size=224",
             "--data.local_crops_number=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.logger=false",
             "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip
    main(["fit", *small, *model, "--trainer.default_root_dir=ours", "--checkpoint.save_top_k=-1"])
    first = torch.load(next((tmp_path / "ours").rglob("epoch=0-*.ckpt")), weights_only=True)
    module = DINOModule("vit_tiny", out_dim=32, norm_last_layer=False)
    held = in_the_references_layout(first, module, **flags, batch_size_per_gpu=4, epochs=2, use_fp16=False, local_crops_number=0,
                                    global_crops_scale=(0.4, 1.0), seed=0, world_size=1)  # fmt: skip
    torch.save(held, "checkpoint.pth")
    main(["adopt", "--checkpoint", "checkpoint.pth"])
    assert "1 of 2 epochs of 2 steps of 4 images" in capsys.readouterr().out
    main(["fit", "--config", "adopted/config.yaml", *small[:5], *small[6:7], *small[8:], "--trainer.default_root_dir=theirs",
          "--ckpt_path", "adopted/adopted.ckpt"])  # fmt: skip
    ends = [torch.load(next((tmp_path / name).rglob("last.ckpt")), weights_only=True) for name in ("ours", "theirs")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 4
    for key, value in ends[0]["state_dict"].items():
        assert torch.equal(ends[1]["state_dict"][key], value), key


def test_adopt_names_what_is_wrong(tmp_path):
    torch.save({"teacher": {"backbone.cls_token": torch.zeros(1)}}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="half.pth holds no flags of main_dino.py .*, but teacher"):
        main(["adopt", "--checkpoint", str(tmp_path / "half.pth")])
    torch.save({"args": argparse.Namespace(model="deit_tiny")}, tmp_path / "deit.pth")
    with pytest.raises(ValueError, match="deit.pth holds flags .* of another program than main_dino.py: there is no arch"):
        main(["adopt", "--checkpoint", str(tmp_path / "deit.pth")])
    flags = argparse.Namespace(arch="deit_tiny", out_dim=32, batch_size_per_gpu=4, epochs=2)
    torch.save({"args": flags, "fp16_scaler": {"scale": 2.0}}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="half.pth is of a run in half precision, .* give steps_per_epoch"):
        main(["adopt", "--checkpoint", str(tmp_path / "half.pth")])
    torch.save({"student": {}, "teacher": {}, "args": flags, "epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="empty.pth is no whole checkpoint of a network as its flags describe it"):
        main(["adopt", "--checkpoint", str(tmp_path / "empty.pth")])
