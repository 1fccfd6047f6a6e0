"""dino-lightning track: objects of a first frame followed through a film, measured and written."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dino_lightning.__main__ import main
from dino_lightning.data.painting import IMAGENET_MEAN
from dino_lightning.evaluation.tracking import contour_accuracy, region_similarity
from dino_lightning.tools import track
from dino_lightning.tools.track import _Look, _palette


def squares(step: int) -> np.ndarray:
    """Where two objects are, (60, 80): one goes right, one down."""
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 5 + 4 * step : 25 + 4 * step] = 1
    mask[20 + 3 * step : 36 + 3 * step, 60:76] = 2
    return mask


def write_film(folder, masks, count=5):
    """frame8 to frame12, so that names and numbers are in another order."""
    folder.mkdir(parents=True), masks.mkdir(parents=True)
    ground = np.random.default_rng(0).integers(0, 90, (60, 80, 3), dtype=np.uint8)
    for step in range(count):
        mask = squares(step)
        colours = np.array([[0, 0, 0], [250, 40, 40], [40, 40, 250]], np.uint8)
        pixels = np.where((mask > 0)[..., None], colours[mask], ground)
        Image.fromarray(pixels).save(folder / f"frame{step + 8}.jpg", quality=95)
        image = Image.fromarray(mask)
        image.putpalette(_palette().tobytes())
        image.save(masks / f"frame{step + 8}.png")
    return folder, masks


def read(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


@pytest.fixture
def film(tmp_path):
    return write_film(tmp_path / "frames", tmp_path / "truth")


def test_a_film_is_followed_written_and_measured(film, small_checkpoint, tmp_path, capsys):
    frames, truth = film
    found = track(str(frames), checkpoint=small_checkpoint, mask=str(truth / "frame8.png"), truth=str(truth), output=str(tmp_path / "out"),
                  compare=True)  # fmt: skip
    names = [f"frame{i}.png" for i in range(8, 13)]
    masks = [read(tmp_path / "out" / "masks" / name) for name in names]
    assert np.array_equal(masks[0], squares(0)) and all(mask.shape == (60, 80) and mask.max() <= 2 for mask in masks)
    assert (tmp_path / "out" / "overlay.mp4").stat().st_size > 1000 or len(list((tmp_path / "out" / "overlay").iterdir())) == 5
    between = [(masks[i] == label, squares(i) == label) for label in (1, 2) for i in (1, 2, 3)]
    j, f = ([measure(*pair) for pair in between] for measure in (region_similarity, contour_accuracy))
    assert found["trained"] == pytest.approx((np.mean(j), np.mean(f))) and set(found) == {"trained", "untrained"}
    still = np.mean([region_similarity(squares(0) == label, squares(i) == label) for label in (1, 2) for i in (1, 2, 3)])
    assert found["trained"][0] > still + 0.1, "colours alone tell these squares; objects that stood still would have " + f"{still:.2f}"
    assert "5 frames in" in (said := capsys.readouterr().out) and "of 2 objects" in said


def test_davis_is_measured_in_its_layout(small_checkpoint, tmp_path, capsys, monkeypatch):
    looks = []
    monkeypatch.setattr(sys.modules[_Look.__module__], "_Look", lambda *args: looks.append(args[3:]) or _Look(*args))
    root = tmp_path / "davis"
    for name in ("bear", "cows"):
        write_film(root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name, count=3)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("bear\ncows\n")
    main(["track", str(root), "--checkpoint", small_checkpoint, "--output", str(tmp_path / "out"), "--image_size", "64"])
    assert "of 4 objects" in capsys.readouterr().out and looks == [((0.228, 0.224, 0.225), 64, 64)] * 2
    assert sorted(path.name for path in (tmp_path / "out" / "cows" / "masks").iterdir()) == ["frame10.png", "frame8.png", "frame9.png"]
    with pytest.raises(ValueError, match="DAVIS has masks of its own"):
        track(str(root), checkpoint=small_checkpoint, mask="any.png")


def test_frames_of_davis_are_shown_as_the_reference_shows_them():
    std = (0.228, 0.224, 0.225)
    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # its last feature map is what it is shown
    look = _Look(network, torch.device("cpu"), IMAGENET_MEAN, std, 480, 64)
    assert [look.size(*sides) for sides in ((480, 854), (854, 480), (1080, 1920), (480, 910))] == [
        (480, 832),
        (832, 480),
        (480, 832),
        (480, 896),
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (80, 122, 3), dtype=np.uint8)
    shown = look._replace(side=64, coarse=32).features(pixels).permute(1, 2, 0).numpy()
    assert shown.shape == (64, 96, 3)
    expected = np.zeros(shown.shape)
    for y in range(64):
        for x in range(96):  # bilinear, smaller without a filter against aliasing, to whole numbers
            at = ((y + 0.5) * 80 / 64 - 0.5, (x + 0.5) * 122 / 96 - 0.5)
            top, left = (int(np.floor(a)) for a in at)
            dy, dx = at[0] - top, at[1] - left
            for row, weight in ((top, 1 - dy), (top + 1, dy)):
                for column, share in ((left, 1 - dx), (left + 1, dx)):
                    expected[y, x] += weight * share * pixels[np.clip(row, 0, 79), np.clip(column, 0, 121)]
    assert np.abs(shown * std + IMAGENET_MEAN - expected / 255).max() < 0.51 / 255


def test_what_cannot_be_followed_is_named(film, small_checkpoint, tmp_path):
    frames, truth = film
    first = str(truth / "frame8.png")

    def refused(words, *names, kind=ValueError, **options):
        with pytest.raises(kind, match=words):
            track(*names, checkpoint=small_checkpoint, output=options.pop("output", str(tmp_path / "out")), **options)

    refused("give one folder of frames", mask=first)
    refused("say by --mask", str(frames))
    refused("fps must lie between", str(frames), mask=first, fps=0.0)
    refused("--compare measures, and needs --truth", str(frames), mask=first, compare=True)
    refused("image_size must be", str(frames), mask=first, image_size=0)
    refused("choose another output", str(frames), mask=first, output=str(frames), kind=FileExistsError)
    Image.new("L", (80, 60)).save(tmp_path / "empty.png")
    refused("marks nothing", str(frames), mask=str(tmp_path / "empty.png"))
    Image.new("L", (8, 6), 1).save(tmp_path / "small.png")
    refused("the mask has 8×6 pixels, the first frame 80×60", str(frames), mask=str(tmp_path / "small.png"))
    (frames / "frame7.jpg").write_text("no image")
    refused("the first frame, frame7, cannot be read", str(frames), mask=first, output=str(tmp_path / "out3"))
    (frames / "frame7.jpg").unlink()
    Image.new("RGB", (80, 61)).save(frames / "frame99.jpg")
    refused("the frame frame99 has 80×61 pixels, the first one 80×60", str(frames), mask=first, output=str(tmp_path / "out4"))
    (frames / "frame99.jpg").unlink()
    Image.new("RGB", (80, 60), "red").save(tmp_path / "colours.png")
    refused("has colours or transparency", str(frames), mask=str(tmp_path / "colours.png"))
    (tmp_path / "others").mkdir()
    for i in range(3):
        Image.new("L", (80, 60), 1).save(tmp_path / "others" / f"{i}.png")
    refused("has the name of a frame", str(frames), mask=first, truth=str(tmp_path / "others"), output=str(tmp_path / "out2"))
