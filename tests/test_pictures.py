"""Pictures: heat maps, cut-outs, sheets; drawn during training and by the command line; the report of the quickstart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from lightning.pytorch import Trainer
from PIL import Image
from torch.nn import functional as F

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.backbones import redrawn
from dino_lightning.callbacks import AttentionMaps, SceneReport
from dino_lightning.cli import main
from dino_lightning.data import Scenes, read_image
from dino_lightning.data.geometry import center_view, whole_view
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, normalize
from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.attention import best_head_iou
from dino_lightning.pictures import cut_out, framed, heat_map, rgb, sheet
from dino_lightning.tools.attention import attention


def data(**options):
    return MultiCropDataModule(batch_size=4, num_workers=0, global_crops_size=32, local_crops_size=16, local_crops_number=2, **options)


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


def test_heat_of_one_range_is_comparable_between_images():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    weak, strong = (heat_map(image, torch.tensor([[0.1, top]]), (0.1, 0.9)).astype(int).sum(axis=-1) for top in (0.3, 5.0))
    assert weak[0, 0] == strong[0, 0] and weak.max() < 400 < strong.max(), "what lies above the range is as bright as its end"


def test_framed_keeps_the_proportions():
    red = np.full((20, 40, 3), (255, 0, 0), dtype=np.uint8)
    cell = framed(red, (60, 60))
    assert cell.shape == (60, 60, 3) and (cell == (255, 0, 0)).all(axis=-1).sum() == 30 * 60
    assert (cell[0] == 255).all() and (cell[30] == (255, 0, 0)).all()


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


def test_long_text_stays_in_its_cell():
    blank = np.full((8, 8, 3), 255, dtype=np.uint8)
    page = np.asarray(sheet([["W" * 40, blank]], ["", ""], cell=(90, 60)))
    dark = (page < 128).any(axis=(0, 2))
    assert dark[:66].any() and not dark[67:].any()


def test_whole_view_keeps_the_shape_and_fits_the_patches():
    image = np.zeros((90, 161, 3), dtype=np.uint8)
    assert whole_view(image, 64, 8).shape == (3, 64, 112)
    assert whole_view(image.transpose(1, 0, 2), 64, 8).shape == (3, 112, 64)
    assert whole_view(image, 60, 14).shape == (3, 56, 112)


def test_attention_is_drawn_before_during_and_after_training(tmp_path, image_folder):
    run = trainer(tmp_path / "run", AttentionMaps(every_n_epochs=2, count=3), max_epochs=3, logger=False)
    run.fit(module(), data(root=image_folder))
    drawn = sorted((tmp_path / "run/pictures").iterdir())
    assert [path.name for path in drawn] == [f"{name}_{step:07d}.png" for name in ("attention", "pca") for step in (0, 12, 18)]
    for first, _, last in (drawn[:3], drawn[3:]):
        first, last = (np.asarray(Image.open(path)).astype(int) for path in (first, last))
        assert first.shape == last.shape and (first != last).any()
        assert (first[80:200, 6:150] == last[80:200, 6:150]).all(), "of the same images"


def test_a_resumed_run_does_not_draw_the_beginning_again(tmp_path, image_folder):
    first = trainer(tmp_path / "run", max_epochs=1, logger=False)
    first.fit(module(), data(root=image_folder))
    first.save_checkpoint(tmp_path / "one.ckpt")
    again = trainer(tmp_path / "again", AttentionMaps(), max_epochs=2, logger=False)
    again.fit(module(), data(root=image_folder), ckpt_path=tmp_path / "one.ckpt")
    drawn = sorted(path.name for path in (tmp_path / "again/pictures").iterdir())
    assert drawn == ["attention_0000012.png", "pca_0000012.png"]


def test_examples_are_evenly_spaced_queries_or_training_images(tmp_path, image_folder):
    unlabelled = data(root=image_folder)
    unlabelled.setup("fit")
    views = unlabelled.examples(4)
    assert views.shape == (4, 3, 32, 32) and views.dtype == torch.uint8
    files = sorted(image_folder.iterdir())
    assert torch.equal(views[1], center_view(read_image(files[6]), (32, 32)))
    assert len(unlabelled.examples(100)) == 24
    files[6].write_text("not an image")
    assert torch.equal(unlabelled.examples(4)[1], center_view(read_image(files[7]), (32, 32))), "the next one, and not a black one"
    for split, first in (("train", 0), ("val", 50)):
        write_images(tmp_path / "labelled" / split / "a", 8, first=first)
        write_images(tmp_path / "labelled" / split / "b", 8, first=first + 20)
    labelled = data(root=tmp_path / "labelled")
    labelled.setup("fit")
    expected = center_view(read_image(tmp_path / "labelled/val/a/0050.jpg"), (32, 32))
    assert torch.equal(labelled.examples(2)[0], expected)


def test_attention_maps_leave_other_runs_alone(tmp_path, image_folder, caplog):
    caplog.set_level("INFO")
    run = trainer(tmp_path / "pooled", AttentionMaps(), max_epochs=1, logger=False)
    run.fit(module(backbone=torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())), data(root=image_folder))
    batches = torch.utils.data.DataLoader([[torch.rand(3, 32, 32)] * 2] * 8, batch_size=4)
    trainer(tmp_path / "loader", AttentionMaps(), max_epochs=1, logger=False).fit(module(), batches)
    assert not list(tmp_path.rglob("pictures"))
    for reason in ("Sequential has no last feature map", "the data do not come from a MultiCropDataModule"):
        assert f"no pictures of attention: {reason}" in caplog.text
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        AttentionMaps(every_n_epochs=0)


def test_a_cnn_is_drawn_and_trains_as_without_pictures(tmp_path, image_folder):
    states = []
    for callbacks in ([AttentionMaps(every_n_epochs=1)], []):
        torch.manual_seed(0)
        network = module(backbone="resnet18", img_size=32)
        trainer(tmp_path / f"run{len(states)}", *callbacks, max_epochs=1, limit_train_batches=2, logger=False).fit(
            network, data(root=image_folder)
        )
        states.append(network.state_dict())
    drawn = sorted(path.name for path in (tmp_path / "run0/pictures").iterdir())
    assert drawn == [f"{name}_{step:07d}.png" for name in ("attention", "pca") for step in (0, 2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(folder / "run", max_epochs=1, logger=False)
    run.fit(module(backbone="vit_tiny", img_size=32, patch_size=8), data(root=write_images(folder / "images", 24)))
    run.save_checkpoint(folder / "module.ckpt")
    return folder / "module.ckpt"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/a/0000.jpg, photos/b/0000.jpg of 50 × 90 pixels, masks/ to match."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:50, 0:90]
    for i, name in enumerate("ab"):
        write_images(Path("photos") / name, 1, size=(90, 50))
        (Path("masks") / name).mkdir(parents=True)
        Image.fromarray(((x > 40 * i) & (y < 30)).astype(np.uint8)).save(f"masks/{name}/0000.png")
    return Path("photos")


def test_attention_command_draws_and_measures_what_evaluation_says(photos, checkpoint, capsys):
    main(["attention", "photos", "--checkpoint", str(checkpoint), "--output", "maps", "--masks", "masks"])
    assert sorted(path.name for path in Path("maps").iterdir()) == ["0000_attention.png", "0000_attention_2.png", "pca.png"]
    vit = DINOModule.load_from_checkpoint(checkpoint).eval().teacher.backbone
    expected = []
    for name in "ab":
        image = whole_view(read_image(photos / name / "0000.jpg"), 64, 8)[None]
        with torch.no_grad():
            maps = vit.get_cls_attention(normalize(image, IMAGENET_MEAN, IMAGENET_STD))
        truth = torch.from_numpy(np.asarray(Image.open(f"masks/{name}/0000.png")) > 0)
        expected.append(best_head_iou(maps, truth[None]).item())
    said = capsys.readouterr().out
    assert "2 pictures in maps, and maps/pca.png" in said and abs(float(said.split()[-1]) - np.mean(expected)) < 1e-3


def test_attention_command_takes_its_options_to_heart(photos, checkpoint):
    def draw(*options):
        overlaps = attention("photos/a/0000.jpg", checkpoint=str(checkpoint), masks="masks/a", **dict(options))
        ((path, overlap),) = overlaps.items()
        return np.asarray(Image.open(path)), overlap

    picture, overlap = draw()
    for option in (("image_size", 32), ("mass", 0.3), ("mean", (0.1, 0.2, 0.3)), ("std", (0.7, 0.1, 0.4))):
        other, differing = draw(option)
        assert differing != overlap and not (other.shape == picture.shape and (other == picture).all()), option


def test_attention_command_draws_the_untrained_network_below(photos, checkpoint):
    def draw(**options):
        ((path, overlap),) = attention("photos/a/0000.jpg", checkpoint=str(checkpoint), masks="masks/a", **options).items()
        return np.asarray(Image.open(path)), overlap

    (alone, overlap), (both, same) = draw(), draw(compare=True)
    assert same == overlap and both.shape[1] == alone.shape[1] and (both[: len(alone)] == alone).all()
    below = both[len(alone) :]  # image, heat maps and masks of the other network
    rows, top = len(below), len(alone) - len(below)
    assert rows > 100 and (below != alone[top : top + rows]).any() and (below != 255).any()


def test_attention_command_leaves_the_images_alone(photos, checkpoint, caplog):
    (photos / "a/broken.jpg").write_bytes(b"no image")
    before = {path: path.read_bytes() for path in photos.rglob("*.jpg")}
    for _ in range(2):
        drawn = attention("photos", checkpoint=str(checkpoint), output="photos")
        assert len(drawn) == 2, "not what it drew before"
        assert all(path.read_bytes() == content for path, content in before.items())
    assert "broken.jpg" in caplog.text


def test_attention_command_leaves_another_pca_png_alone(photos, checkpoint):
    for _ in range(2):  # its own may be overwritten
        attention("photos", checkpoint=str(checkpoint), output="maps")
    Image.new("RGB", (9, 9)).save("maps/pca.png")
    with pytest.raises(FileExistsError, match=r"maps/pca\.png is not a picture of this command"):
        attention("photos", checkpoint=str(checkpoint), output="maps")
    attention("photos", checkpoint=str(checkpoint), output="maps", pca=0)
    assert Image.open("maps/pca.png").size == (9, 9)


def test_pca_picture_shows_the_first_images(photos, checkpoint):
    write_images(photos / "c", 1, size=(50, 90))
    write_images(photos / "d", 3)

    def pca_size(count):
        attention("photos", checkpoint=str(checkpoint), output=f"maps{count}", pca=count)
        return Image.open(f"maps{count}/pca.png").size

    (w2, h2), (w3, h3), (w6, h6) = pca_size(2), pca_size(3), pca_size(6)
    assert w2 == w3 == 6 + 4 * 156 and h3 - h2 == 3 * 156 - 2 * 92, "with an upright image the cells are squares"
    assert w6 == 6 + 8 * 156 and h6 == h3, "more than four stand two in a row"
    assert not list(Path("maps2").glob("pca_*")) and len(list(Path("maps2").glob("*_attention*.png"))) == 6


def test_attention_command_draws_the_feature_norm_of_a_cnn(photos, image_folder, capsys):
    run = trainer("cnn", max_epochs=1, limit_train_batches=1, logger=False)
    run.fit(module(backbone="resnet18", img_size=32), data(root=image_folder))
    run.save_checkpoint("cnn.ckpt")
    main(["attention", "photos", "--checkpoint", "cnn.ckpt", "--output", "maps", "--masks", "masks", "--image_size", "64"])
    network = DINOModule.load_from_checkpoint("cnn.ckpt").teacher.backbone.eval()
    expected = []
    for name in "ab":
        image = whole_view(read_image(photos / name / "0000.jpg"), 64, 32)[None]
        assert image.shape[2:] == (64, 128)
        maps = []
        with torch.no_grad():
            network.layer4.register_forward_hook(lambda *passed: maps.append(passed[2].norm(dim=1, keepdim=True)))
            network(normalize(image, IMAGENET_MEAN, IMAGENET_STD))
        truth = torch.from_numpy(np.asarray(Image.open(f"masks/{name}/0000.png")) > 0)
        expected.append(best_head_iou(maps[0], truth[None]).item())
    assert abs(float(capsys.readouterr().out.split()[-1]) - np.mean(expected)) < 1e-3
    assert len(list(Path("maps").iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["photos", "--pca", "-1"], ValueError, "pca must be a number of images, .* got -1"),
        (["photos/c.jpg"], FileNotFoundError, "no image 'photos/c.jpg'"),
        (["photos", "--masks", "none"], FileNotFoundError, r"no mask a/0000 \(.png, .* in none"),
        (["photos/a/0000.jpg", "--masks", "empty"], ValueError, r"0000\.png marks nothing"),
        (["photos/a/0000.jpg", "--masks", "turned"], ValueError, "has 90×50 pixels, but its image 50×90"),
        (["photos/a/0000.jpg", "--masks", "colours"], ValueError, "save it with one channel"),
        (["photos", "--mass", "60"], ValueError, "got 60.0: it is a share"),
        (["photos", "--image_size", "0"], ValueError, "at least 1 pixel, got 0"),
    ],
)
def test_attention_command_names_what_is_wrong(photos, checkpoint, options, error, message):
    for name, mode, size in (("empty", "L", (90, 50)), ("turned", "L", (50, 90)), ("colours", "RGBA", (90, 50))):
        Path(name).mkdir()
        Image.new(mode, size).save(f"{name}/0000.png")
    with pytest.raises(error, match=message):
        main(["attention", *options, "--checkpoint", str(checkpoint)])
    assert not Path("attention").exists()


def test_scene_report_says_what_evaluation_says(tmp_path, capsys):
    report, network = SceneReport(bank=40, queries=5, k=5), module()
    trainer(tmp_path, report, logger=False).fit(network, data(dataset=Scenes(64, side=32)))
    said = capsys.readouterr().out
    (bank, labels, _), (queries, truth, masks) = Scenes(40, side=32).tensors(), Scenes(5, 2 * 10**6, side=32).tensors()

    def numbers(vit):
        def seen(images, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
            return normalize(images, IMAGENET_MEAN, IMAGENET_STD)

        with torch.no_grad():
            accuracy, _ = knn_accuracy(vit(seen(bank, 32)), labels, vit(seen(queries, 32)), truth, k=5)
            return accuracy, best_head_iou(vit.get_cls_attention(seen(queries, 64)), masks).mean()

    (untrained, iou_before), (trained, iou_after) = numbers(redrawn(network.teacher.backbone)), numbers(network.teacher.backbone)
    accuracies = next(line for line in said.splitlines() if line.startswith("k-NN accuracy (k = 5)")).split()
    assert accuracies[-2:] == [f"{untrained:.1%}", f"{trained:.1%}"]
    overlaps = next(line for line in said.splitlines() if line.startswith("attention on object (IoU)")).split()
    assert overlaps[-2:] == [f"{iou_before:.2f}", f"{iou_after:.2f}"] and iou_before != iou_after
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"--checkpoint {checkpoint}" in said
    assert Image.open(tmp_path / "pictures/before_after.png").width > 8 * 112


def test_scene_report_refuses_other_data(tmp_path, image_folder):
    with pytest.raises(TypeError, match="SceneReport is for runs .* on NoneType; leave this callback out"):
        trainer(tmp_path, SceneReport(), logger=False).fit(module(), data(root=image_folder))
    with pytest.raises(ValueError, match="at least 1, got 1024, 0 and 20"):
        SceneReport(queries=0)
