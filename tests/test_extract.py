"""dino-lightning extract: features of a checkpoint in files, interrupted and not."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from dino_lightning import DINOModule, MultiCropDataModule
from dino_lightning.callbacks import FeatureWriter
from dino_lightning.cli import main
from dino_lightning.data import ImageFiles, read_image
from dino_lightning.data.geometry import center_view
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, normalize
from dino_lightning.tools import feature_folder
from dino_lightning.tools.extract import extract
from dino_lightning.tools.feature_folder import read_features


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/ with a/0000.jpg to 0005.jpg, b/0000.jpg to 0002.jpg and a broken b/0001x.jpg."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos/a"), 6)
    write_images(Path("photos/b"), 3, first=0)
    Path("photos/b/0001x.jpg").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints[0]


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def seen(checkpoint, paths):
    """The teacher's backbone, and what it sees of images."""
    vit = DINOModule.load_from_checkpoint(checkpoint, map_location="cpu").eval().teacher.backbone
    views = torch.stack([center_view(read_image(path), (32, 32)) for path in paths])
    return vit, normalize(views, IMAGENET_MEAN, IMAGENET_STD)


def test_features_and_paths_are_those_of_the_images(photos, checkpoint, caplog, capsys):
    main(["extract", "photos", "--checkpoint", checkpoint, "--output", "out", "--batch_size", "4"])
    features, paths = np.load("out/features.npy"), Path("out/paths.txt").read_text().splitlines()
    assert paths == [str(photos / name) for name in [*(f"a/000{i}.jpg" for i in range(6)), *(f"b/000{i}.jpg" for i in range(3))]]
    vit, images = seen(checkpoint, paths)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features), vit(images), rtol=1e-5, atol=1e-6)
    assert features.dtype == np.float32 and features.shape == (9, 24)
    assert "0001x.jpg" in caplog.text and "9 images" in capsys.readouterr().out
    facts = json.loads(Path("out/features.json").read_text())
    assert (facts["images"], facts["features"], facts["unreadable"], facts["complete"]) == (10, 9, 1, True)
    assert facts["checkpoint"] == checkpoint and facts["size"] == [32, 32] and facts["mean"] == list(IMAGENET_MEAN)
    np.save("as_numpy.npy", features)
    assert Path("as_numpy.npy").read_bytes() == Path("out/features.npy").read_bytes()


def test_the_same_numbers_as_predict(photos, checkpoint):
    data = MultiCropDataModule(photos, batch_size=4, num_workers=0, global_crops_size=32, local_crops_number=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[FeatureWriter()],
                      default_root_dir="predicted")  # fmt: skip
    trainer.predict(DINOModule.load_from_checkpoint(checkpoint), data, return_predictions=False)
    extract("photos", checkpoint=checkpoint, output="out", batch_size=4)
    for name in ("features.npy", "paths.txt"):
        assert files("predicted")[name] == files("out")[name]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[FeatureWriter()],
                      default_root_dir="alone")  # fmt: skip
    images = DataLoader(TensorDataset(torch.rand(3, 3, 32, 32)), batch_size=2)
    trainer.predict(DINOModule.load_from_checkpoint(checkpoint), images, return_predictions=False)
    assert list(files("alone")) == ["features.npy"] and np.load("alone/features.npy").shape == (3, 24), "which have no paths"


def test_patches_and_layers(photos, checkpoint):
    extract("photos/a", checkpoint=checkpoint, output="patches", what="patches", image_size=48)
    extract("photos/a", checkpoint=checkpoint, output="layers", what="layers", n_blocks=2)
    extract("photos/a", checkpoint=checkpoint, output="cls")
    patches, layers, cls = (np.load(f"{what}/features.npy") for what in ("patches", "layers", "cls"))
    assert patches.shape == (6, 24, 6, 6) and layers.shape == (6, 2, 24)
    np.testing.assert_allclose(layers[:, -1], cls, rtol=1e-5, atol=1e-6)
    vit, images = seen(checkpoint, Path("layers/paths.txt").read_text().splitlines())
    with torch.no_grad():
        tokens = vit.get_intermediate_layers(images, 2)
        torch.testing.assert_close(torch.from_numpy(layers[:, 0]), tokens[0][:, 0])
        image = normalize(center_view(read_image(photos / "a/0003.jpg"), (48, 48))[None], IMAGENET_MEAN, IMAGENET_STD)
        (token,) = vit.get_intermediate_layers(image, 1)
    np.testing.assert_allclose(patches[3, :, 2, 5], token[0, 1 + 2 * 6 + 5].numpy(), rtol=1e-5, atol=1e-6)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_an_interrupted_extraction_goes_on(photos, checkpoint, monkeypatch, batches):
    """Raised in a forward pass; also as a machine that dies would leave the folder, with rows that the facts do not know."""
    options = {"checkpoint": checkpoint, "batch_size": 3}
    extract("photos", **options, output="whole")
    forward, calls = DINOModule.forward, []

    def fail_later(module, images):
        if len(images) and len(calls) == 1 + batches:  # the first sees the shape
            shutil.copytree("out", "died") if Path("out").exists() else None
            raise Interrupted
        calls.append(len(images))
        return forward(module, images)

    monkeypatch.setattr(feature_folder, "_SECONDS", 0.0)
    monkeypatch.setattr(DINOModule, "forward", fail_later)
    with pytest.raises(Interrupted):
        extract("photos", **options, output="out")
    with pytest.raises(ValueError, match=f"stopped after {3 * batches} of 10 images; the same dino-lightning extract"):
        read_features("out")
    assert len(np.load("out/features.npy")) == 0, "a part is not taken for the whole"
    monkeypatch.setattr(DINOModule, "forward", lambda module, images: calls.append(len(images)) or forward(module, images))
    calls.clear()
    extract("photos", **options, output="out")
    assert sum(calls) == 1 + 10 - 3 * batches - (batches < 3), "the images before are not read again"
    assert files("out") == files("whole")
    for name in ("features.npy", "paths.txt"):
        with open(f"died/{name}", "ab") as file:
            file.write(b"left behind" * 100)
    extract("photos", **options, output="died")
    assert files("died") == files("whole")


def test_a_complete_extraction_is_left_alone(photos, checkpoint, monkeypatch):
    extract("photos", checkpoint=checkpoint, output="photos")
    before = files("photos/a") | {name: (photos / name).read_bytes() for name in ("features.npy", "paths.txt", "features.json")}
    monkeypatch.setattr(sys.modules["dino_lightning.tools.extract"], "features_with_paths", None)
    extract("photos", checkpoint=checkpoint, output="photos")  # nor is features.npy among the images
    assert before == files("photos/a") | {name: (photos / name).read_bytes() for name in before if name[0] in "fp"}


@pytest.mark.parametrize(
    ("complete", "change", "message"),
    [
        (False, {"checkpoint": 1}, "weights_sha256"),
        (True, {"what": "layers"}, "what cls there, layers here; n_blocks None there, 2 here"),
        (True, {"image_size": 40}, r"size \[32, 32\] there, \[40, 40\] here"),
        (True, {"mean": (0.5, 0.5, 0.5)}, "mean"),
        (True, {"images": ["photos/a"]}, "images 10 there, 6 here"),
        (False, {"images": ["photos/b", "photos/a"]}, "images_sha256"),
    ],
)
def test_other_features_are_never_mixed_in(photos, checkpoints, complete, change, message):
    extract("photos", checkpoint=checkpoints[0], output="out")
    if not complete:
        facts = json.loads(Path("out/features.json").read_text())
        Path("out/features.json").write_text(json.dumps({**facts, "complete": False}))
    before = files("out")
    options = {"images": ["photos"], "checkpoint": 0, "n_blocks": 2, **change}
    checkpoint = checkpoints[options.pop("checkpoint")]
    with pytest.raises(FileExistsError, match=f"features of something else .*{message}.*choose another folder"):
        extract(*options.pop("images"), checkpoint=checkpoint, output="out", **options)
    assert files("out") == before


def test_the_folder_of_a_prediction_is_not_overwritten(photos, checkpoint):
    Path("out").mkdir()
    np.save("out/features.npy", np.zeros((2, 2)))
    before = files("out")
    with pytest.raises(FileExistsError, match="out holds features.npy of something else"):
        extract("photos", checkpoint=checkpoint, output="out")
    assert files("out") == before


def test_a_renamed_checkpoint_is_the_same(photos, checkpoint):
    extract("photos", checkpoint=checkpoint, output="out")
    shutil.copy(checkpoint, "copy.ckpt")
    extract("photos", checkpoint="copy.ckpt", output="out")


def test_images_that_cannot_be_read(photos, checkpoint, caplog):
    for path in Path("photos/b").iterdir():
        path.write_text("no image")
    extract("photos", checkpoint=checkpoint, output="out", batch_size=2)  # two batches of none
    assert len(np.load("out/features.npy")) == len(Path("out/paths.txt").read_text().splitlines()) == 6
    assert caplog.text.count("left out") == 4
    with pytest.raises(ValueError, match="none of the 4 images could be read"):
        extract("photos/b", checkpoint=checkpoint, output="none")


def test_workers_give_the_same_files(photos, checkpoint):
    for workers in (0, 2):
        extract("photos", checkpoint=checkpoint, output=f"workers_{workers}", batch_size=4, num_workers=workers)
    assert files("workers_0") == files("workers_2")


def test_image_files_are_listed_once_and_in_order(photos):
    source = ImageFiles(["photos/b/0002.jpg", "photos", photos / "a"], without=[str(photos / "a/0005.jpg")])
    names = ["b/0002.jpg", *(f"a/000{i}.jpg" for i in range(5)), "b/0000.jpg", "b/0001.jpg", "b/0001x.jpg"]
    assert [source.path(i) for i in range(len(source))] == [str(photos / name) for name in names]
    assert np.array_equal(source[1], read_image(photos / "a/0000.jpg"))
    assert source.path(-1) == str(photos / names[-1])


def test_parquet(photos, checkpoint):
    parquet = pytest.importorskip("pyarrow.parquet")
    main(["extract", "photos", "--checkpoint", checkpoint, "--output", "out"])
    main(["extract", "photos", "--checkpoint", checkpoint, "--output", "out", "--parquet", "true"])  # afterwards, too
    table = parquet.read_table("out/features.parquet")
    assert table["path"].to_pylist() == Path("out/paths.txt").read_text().splitlines()
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[24]"
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), np.load("out/features.npy"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["nowhere"], FileNotFoundError, "no image or folder 'nowhere'"),
        (["empty"], FileNotFoundError, "no images in .*empty: found 0 folders"),
        (["photos", "--what", "layers", "--n_blocks", "3"], ValueError, "n_blocks must lie between 1 and 2, .* got 3"),
        (["photos", "--what", "patches", "--parquet", "true"], ValueError, "one vector an image, got what=patches"),
        (["photos", "--image_size", "30"], ValueError, "patch size 8 does not divide the image size 30×30"),
        (["photos", "--image_size", "0"], ValueError, "at least 1 pixel, got 0"),
        (["photos", "--batch_size", "0"], ValueError, "batch_size must be at least 1, got 0"),
        (["broken"], ValueError, "has a line break"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(photos, checkpoint, options, error, message):
    Path("empty").mkdir()
    write_images(Path("broken/two\nlines"), 1)
    with pytest.raises(error, match=message):
        main(["extract", *options, "--checkpoint", checkpoint, "--output", "out"])
    assert not Path("out").exists()


def test_parquet_without_pyarrow_says_how_to_get_it(photos, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        extract("photos", checkpoint=checkpoint, parquet=True)
    assert not Path("features").exists()


def test_patches_of_other_networks_are_refused(photos, tmp_path):
    module = DINOModule("resnet18", img_size=32, out_dim=16, hidden_dim=16)
    trainer = Trainer(accelerator="cpu", logger=False, barebones=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("cnn.ckpt")
    with pytest.raises(TypeError, match="patches needs a ViT of this package, but cnn.ckpt holds a ResNet; it has --what cls"):
        extract("photos", checkpoint="cnn.ckpt", what="patches")
    extract("photos/a", checkpoint="cnn.ckpt", output="out")
    assert np.load("out/features.npy").shape == (6, 512)


def test_a_folder_that_was_changed_is_noticed(photos, checkpoint):
    extract("photos", checkpoint=checkpoint, output="out")
    lines = Path("out/paths.txt").read_text().splitlines(keepends=True)
    Path("out/paths.txt").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="out was changed: 9 rows in features.npy, 8 in paths.txt"):
        read_features("out")
    extract("photos/a", checkpoint=checkpoint, output="layers", what="layers", n_blocks=1)
    with pytest.raises(ValueError, match="layers holds layers; this needs the features of .* --what cls"):
        read_features("layers")
    with pytest.raises(FileNotFoundError, match="photos has no features.json: make the features with dino-lightning extract"):
        read_features("photos")
