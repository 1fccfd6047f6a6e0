"""Pictures: heat maps, cut-outs, sheets; drawn during training and by the command line; the report of the quickstart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from lightning.pytorch import Trainer
from PIL import Image

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import AttentionMaps, SceneReport
from dino_lightning.cli import main
from dino_lightning.datasets import Scenes
from dino_lightning.multicrop import whole_view
from dino_lightning.pictures import cut_out, heat_map, rgb, sheet


def data(**options):
    return MultiCropDataModule(
        batch_size=4, num_workers=0, global_crops_size=32, local_crops_size=16, local_crops_number=2, **options
    )


def module(**options):
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    return DINOModule(**{"backbone": vit, "out_dim": 64, "hidden_dim": 32, "warmup_epochs": 1, **options})


def trainer(folder, *callbacks, **options):
    return Trainer(**{
        "accelerator": "cpu", "max_epochs": 2, "default_root_dir": folder, "callbacks": list(callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, **options,
    })  # fmt: skip


def test_heat_is_brightest_where_the_attention_is():
    image = torch.full((3, 32, 48), 100, dtype=torch.uint8)
    attention = torch.zeros(4, 6)
    attention[3, 0] = 0.7
    drawn = heat_map(image, attention).astype(int).sum(axis=-1)
    assert drawn.shape == (32, 48)
    assert np.unravel_index(drawn.argmax(), drawn.shape) >= (24, 0) and drawn[28, 4] > 400 > 200 > drawn[4, 40]
    assert heat_map(image, torch.ones(4, 6)).shape == (32, 48, 3), "the same everywhere is no division by zero"


def test_cut_out_darkens_what_is_outside():
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    mask = torch.tensor([[True, False], [False, False]])
    drawn = cut_out(image, mask)
    assert (drawn[:8, :8] == 200).all() and (drawn[8:] < 50).all() and (drawn[:, 8:] < 50).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_channels_can_be_shown(channels):
    image = torch.arange(channels, dtype=torch.uint8)[:, None, None].expand(channels, 4, 6)
    assert rgb(image)[0, 0].tolist() == ([0, 1, 2] if channels >= 3 else [0, 0, 0])


def test_sheet_has_a_cell_for_everything():
    red, blue = (np.full((8, 8, 3), color, dtype=np.uint8) for color in ([255, 0, 0], [0, 0, 255]))
    page = np.asarray(sheet([[red, "text"], [blue, red]], ["one", "two\nlines"], cell=(40, 60), title="a title"))
    for color, cells in (([255, 0, 0], 2), ([0, 0, 255], 1)):
        assert (page == color).all(axis=-1).sum() == cells * 40 * 60
    assert (page.sum(axis=-1) < 300).any(), "and ink"


def test_whole_view_keeps_the_shape_and_fits_the_patches():
    image = np.zeros((90, 161, 3), dtype=np.uint8)
    assert whole_view(image, 64, 8).shape == (3, 64, 112)
    assert whole_view(image.transpose(1, 0, 2), 64, 8).shape == (3, 112, 64)
    assert whole_view(image, 60, 14).shape == (3, 56, 112)


def test_attention_is_drawn_before_during_and_after_training(tmp_path, image_folder):
    run = trainer(tmp_path / "run", AttentionMaps(every_n_epochs=2, count=3), max_epochs=3, logger=False)
    run.fit(module(), data(root=image_folder))
    drawn = sorted((tmp_path / "run/pictures").iterdir())
    assert [path.name for path in drawn] == [f"attention_{step:07d}.png" for step in (0, 12, 18)]
    first, _, last = (np.asarray(Image.open(path)).astype(int) for path in drawn)
    assert first.shape == last.shape and (first != last).any()
    assert (first[50:200, :150] == last[50:200, :150]).all(), "of the same images"


def test_attention_maps_leave_other_runs_alone(tmp_path, image_folder, caplog):
    run = trainer(tmp_path / "cnn", AttentionMaps(), max_epochs=1, logger=False)
    run.fit(module(backbone=torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())), data(root=image_folder))
    batches = torch.utils.data.DataLoader([[torch.rand(3, 32, 32)] * 2] * 8, batch_size=4)
    trainer(tmp_path / "loader", AttentionMaps(), max_epochs=1, logger=False).fit(module(), batches)
    assert not list(tmp_path.rglob("pictures"))
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        AttentionMaps(every_n_epochs=0)


@pytest.fixture
def checkpoint(tmp_path, image_folder):
    run = trainer(tmp_path / "run", max_epochs=1, logger=False)
    run.fit(module(backbone="vit_tiny", img_size=32, patch_size=8), data(root=image_folder))
    run.save_checkpoint(tmp_path / "module.ckpt")
    return tmp_path / "module.ckpt"


def test_attention_command(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "more", 2, size=(90, 50))
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("0000", "0001"):
        Image.fromarray(np.eye(50, 90, dtype=np.uint8) * 255).save(masks / f"{name}.png")
    main(["attention", "more", "more/0001.jpg", "--checkpoint", str(checkpoint), "--output", "maps", "--masks", "masks"])
    pictures = sorted(path.name for path in Path("maps").iterdir())
    assert pictures == ["0000.png", "0001.png", "0001_2.png"]
    assert Image.open("maps/0000.png").width > 4 * 150
    said = capsys.readouterr().out
    assert "3 pictures in maps" in said and 0 < float(said.split()[-1]) < 1


def test_attention_command_names_what_is_wrong(tmp_path, checkpoint, image_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--checkpoint", str(checkpoint)]
    with pytest.raises(FileNotFoundError, match="no image 'nothing.jpg'"):
        main(["attention", "nothing.jpg", *command])
    (tmp_path / "masks").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no mask 0000\.\* in masks"):
        main(["attention", str(image_folder / "0000.jpg"), *command, "--masks", "masks"])
    Image.new("L", (8, 8)).save("masks/0000.png")
    with pytest.raises(ValueError, match=r"0000\.png marks nothing"):
        main(["attention", str(image_folder / "0000.jpg"), *command, "--masks", "masks"])
    assert not Path("attention").exists() or not list(Path("attention").iterdir())


def test_scene_report_says_what_was_learned(tmp_path, capsys):
    report = SceneReport(bank=40, queries=20, k=5)
    trainer(tmp_path, report, logger=False).fit(module(), data(dataset=Scenes(16, side=32)))
    said = capsys.readouterr().out
    assert "Before training, on 20 new scenes" in said and "raw pixels   untrained     trained" in said
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"The checkpoint: {checkpoint}" in said
    picture = np.asarray(Image.open(tmp_path / "pictures/before_after.png"))
    assert picture.shape[1] > 8 * 112


def test_scene_report_refuses_other_data(tmp_path, image_folder):
    with pytest.raises(TypeError, match="SceneReport is for runs .* on NoneType; leave this callback out"):
        trainer(tmp_path, SceneReport(), logger=False).fit(module(), data(root=image_folder))
