"""dino-lightning evaluate: what applies to a folder is measured as the tools measure it, and shown in a page that needs nothing but itself."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import two_colours, write_images, write_labelled
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from dino_lightning.__main__ import main
from dino_lightning.backbones import build
from dino_lightning.data import ImageFolder
from dino_lightning.evaluation.clusters import kmeans, purity
from dino_lightning.evaluation.features import extract_features
from dino_lightning.evaluation.low_shot import low_shot
from dino_lightning.evaluation.spread import rank_me
from dino_lightning.tools import copies, evaluate, knn, linear, segment
from dino_lightning.tools.checkpoint import images_of, load_module
from dino_lightning.tools.run_log import curves

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def report(checkpoints, tmp_path_factory):
    """A folder with images, a run and its evaluation by the command."""
    root = tmp_path_factory.mktemp("evaluate")
    write_labelled(root)
    (root / "images" / "val" / "class0" / "bad.jpg").write_bytes(b"no image")
    (root / "run" / "checkpoints").mkdir(parents=True)
    checkpoint = root / "run" / "checkpoints" / "last.ckpt"
    shutil.copy(checkpoints[0], checkpoint)
    (root / "run" / "config.yaml").touch()
    log = CSVLogger(root, name="", version="run")
    for step in range(0, 40, 10):
        log.log_metrics({"train/loss": 5.0 - step / 10}, step)
    log.log_metrics({"val/knn_top1": 0.25}, 30)
    log.save()
    where = ["--checkpoint", str(checkpoint), "--root", str(root / "images"), "--output", str(root / "out")]
    main(["evaluate", *where, "--shots", "1,0.5", "--draws", "2", "--batch_size", "5"])  # several batches, the last one smaller
    return root


def test_numbers_are_those_of_the_tools(report):
    told = json.loads((report / "out" / "results.json").read_text())
    measures = {measure["name"]: measure for measure in told["measures"]}
    checkpoint, root = str(report / "run" / "checkpoints" / "last.ckpt"), str(report / "images")
    of_knn = knn(checkpoint, root, k=(18,), compare=True)
    assert measures["k-NN, top-1"]["values"] == pytest.approx({name: values[0][0] for name, values in of_knn.items()})
    of_linear = linear(checkpoint, root, compare=True)
    best = {name: max(standing.last[0] for standing in rates.values()) for name, rates in of_linear.items()}
    assert measures["linear, top-1"]["values"] == pytest.approx(best)
    module = load_module(checkpoint)
    seen = []
    for split in ("train", "val"):
        folder = ImageFolder(f"{root}/{split}", classes=["class0", "class1"])
        vectors, labels = extract_features(module, folder, **images_of(module)._asdict())
        seen += [vectors[labels >= 0], labels[labels >= 0]]
    (one, half) = low_shot(*seen, (1, 0.5), draws=2, k=20)
    for name, expected, margin in (
        ("k-NN, labels: 1 a class", one.knn, one.knn_margin),
        ("logistic, labels: 1 a class", one.logistic, one.logistic_margin),
        ("logistic, labels: 50 %", half.logistic, half.logistic_margin),
    ):
        assert measures[name]["values"]["trained"] == pytest.approx(expected) and measures[name]["margins"]["trained"] == pytest.approx(
            margin
        )
        assert set(measures[name]["values"]) == {"trained", "untrained", "raw pixels"}
    assert measures["effective rank"]["values"]["trained"] == pytest.approx(rank_me(seen[0]), rel=1e-4)
    assert measures["cluster purity"]["values"]["trained"] == pytest.approx(purity(kmeans(seen[2], 2)[0], seen[3]))
    assert [told[name] for name in ("method", "image_size", "images", "queries", "classes", "unreadable")] == [
        "DINO",
        [32, 32],
        18,
        7,
        2,
        1,
    ]


def test_the_page_needs_nothing_but_itself(report):
    text = (report / "out" / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{10})', text)) == {"data:image"} and "http" not in text.replace("http-equiv", "")
    assert (
        "What run has learned" in text and "Evaluated on" in text and "18 images, 7 queries, 2 classes, 1 unreadable ones left out" in text
    )
    assert "would be right for 57.1 % of the queries" in text, "four of seven are of train's most frequent class"
    assert text.count("<polyline") == 2 and text.count("<circle") == 1, "a curve, and a single point"
    assert text.count("<svg") == 2 and text.count("<img") == 6 + 3, "curves; images looked at, components, neighbours, clusters"
    told = json.loads(re.search(r"\}\)\((\{.*?\}), \"data:image", text, re.S)[1])
    assert len(told["names"]) == 7 and told["classes"] == ["class0", "class1"] and told["labels"].count(0) == 4, "without the broken one"
    places = np.array(told["maps"]["PCA"])
    assert places.shape == (7, 2) and places.min() == 0 and places.max() == 1


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(report, tmp_path):
    page, picture = report / "out" / "index.html", tmp_path / "page.png"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=3000",
        "--window-size=1000,3000",
    ]
    dom = subprocess.run([*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120).stdout
    legend = re.search(r'<div class="legend">(.*?)</div>', dom, re.S)[1]
    assert re.findall(r"<button[^>]*>(.*?)</button>", legend) == ["class0", "class1"], "the script ran to its end"
    subprocess.run([*command, f"--screenshot={picture}", f"file://{page}"], capture_output=True, timeout=120, check=True)
    colours = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 10_000, "photographs are on it"


def test_folders_without_queries_and_without_classes(checkpoints, tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 5)
    found = evaluate(checkpoints[0], str(photos), output=str(tmp_path / "one"), compare=False)
    assert set(found) == {"effective rank", "spread"} and set(found["spread"]) == {"trained"}
    told = (tmp_path / "one" / "index.html").read_text()
    assert "untrained" not in told and '"classes": []' in told
    two_colours(tmp_path / "colours")
    found = evaluate(checkpoints[0], str(tmp_path / "colours" / "train"), output=str(tmp_path / "two"))
    assert found["nearest is of its class"] == {"trained": 1.0, "untrained": 1.0, "raw pixels": 1.0}
    assert "raw pixels       untrained         trained" in capsys.readouterr().out


def test_images_with_masks(checkpoints, tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / "images" / split, count)
        (tmp_path / "masks" / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.repeat(np.uint8([[0], [1]]), 30, axis=0).repeat(80, axis=1)).save(
                tmp_path / "masks" / split / f"{i:04d}.png"
            )
    found = evaluate(checkpoints[0], str(tmp_path), output=str(tmp_path / "out"), draws=1)
    expected = segment(checkpoints[0], str(tmp_path), compare=True)
    assert found["segmentation, mIoU"] == pytest.approx({name: values[0] for name, values in expected.items()})
    assert "k-NN" not in (tmp_path / "out" / "index.html").read_text(), "folders of splits are no classes"


def test_curves_of_tensorboard(tmp_path):
    log = TensorBoardLogger(tmp_path, name="", version="run")
    for step in range(3):
        log.log_metrics({"train/loss": 2.0 - step, "train/lr": 0.1}, step)
    log.finalize("success")
    assert curves(tmp_path / "run", ("train/loss", "val/knn_top1")) == {"train/loss": [(0.0, 2.0), (1.0, 1.0), (2.0, 0.0)]}
    assert curves(tmp_path, ("train/loss",)) == {}


def test_refused(checkpoints, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 images of .*bad could be read"):
        evaluate(checkpoints[0], str(tmp_path / "bad"), output=str(tmp_path / "out"))
    for options, words in (
        ({"draws": 0}, "draws at least 1; got 0"),
        ({"k": 0}, "k must be at least 1"),
        ({"batch_size": 0}, "batch_size must be"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(checkpoints[0], str(tmp_path / "bad"), output=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotADirectoryError, match="a.jpg is a file; choose another output"):
        evaluate(checkpoints[0], str(tmp_path / "bad"), output=str(tmp_path / "bad" / "a.jpg"))


def test_sets_of_known_layouts(checkpoints, tmp_path, capsys):
    """Copydays; and DAVIS, a film of which has lost a mask: that is said, and the rest goes on."""
    days = tmp_path / "days"
    write_images(days / "original", 3), write_images(days / "strong", 3)
    found = evaluate(checkpoints[0], str(days), output=str(tmp_path / "one"), compare=False)
    assert found["copies strong, mAP"] == {"trained": copies(checkpoints[0], str(days))["trained"]["strong"]}
    davis = tmp_path / "davis"
    write_images(davis / "JPEGImages" / "480p" / "cow", 3)
    (davis / "ImageSets" / "2017").mkdir(parents=True)
    (davis / "ImageSets" / "2017" / "val.txt").write_text("cow\n")
    capsys.readouterr()
    found = evaluate(checkpoints[0], str(davis), output=str(tmp_path / "two"), compare=False)
    assert "tracking: not measured: " in capsys.readouterr().out and set(found) == {"effective rank", "spread"}
    text = (tmp_path / "two" / "index.html").read_text()
    assert "Not measured: " in text and "Where do the images lie?" in text


def test_odd_folders(checkpoints, tmp_path, capsys):
    # A class of this name is no Copydays; queries without classes are left out; names that are no text, or HTML.
    root = tmp_path / "kaggle"
    (
        write_images(root / "train" / "original", 3),
        write_images(root / "train" / "edited</script>", 3, first=3),
        write_images(root / "test", 2),
    )
    name = os.fsencode(root / "train" / "original") + b"/\xff<b>.jpg"
    shutil.copy(root / "train" / "original" / "0000.jpg", name)
    found = evaluate(checkpoints[0], str(root), output=str(tmp_path / "one"), compare=False, draws=1)
    assert set(found) == {"effective rank", "spread", "nearest is of its class", "cluster purity", "cluster NMI"}
    assert "the queries are left out" in capsys.readouterr().out
    assert (tmp_path / "one" / "index.html").read_text(errors="strict").count("</script>") == 1
    # Other weights, a CNN, four channels, one image alone.
    torch.save(build("vit_tiny", patch_size=16, in_chans=4).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "four").mkdir()
    np.save(tmp_path / "four" / "a.npy", np.zeros((40, 50, 4), np.uint8))
    evaluate(str(tmp_path / "weights.pth"), str(tmp_path / "four"), output=str(tmp_path / "two"), image_size=32, compare=False)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["method"] is None
    torch.save(build("resnet18").state_dict(), tmp_path / "cnn.pth")
    evaluate(str(tmp_path / "cnn.pth"), str(tmp_path / "kaggle" / "test"), output=str(tmp_path / "three"), image_size=64)
    assert "the norm of its features" in (tmp_path / "three" / "index.html").read_text()
