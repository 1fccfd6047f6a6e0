"""dino-lightning shrink: a folder made smaller once."""

import numpy as np
import pytest
from PIL import Image

from dino_lightning.__main__ import main
from dino_lightning.data import read_image


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "cats").mkdir(parents=True)
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((600, 800), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(root / "cats" / "turned.jpg", exif=exif, quality=95, icc_profile=b"profile")
    large.save(root / "large.png")
    large.quantize(16).save(root / "palette.png")
    large.convert("L").save(root / "gray.jpg")
    large.resize((90, 70)).save(root / "small.jpg")
    Image.fromarray(rng.integers(0, 60_000, (300, 300), dtype=np.uint16)).save(root / "deep.tif")
    np.save(root / "many.npy", rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    (root / "broken.jpg").write_bytes((root / "gray.jpg").read_bytes()[:3000])
    (root / "text.jpg").write_text("no image")
    return root


def test_large_images_shrink_and_the_rest_stays(folder, tmp_path, capsys):
    output = tmp_path / "small"
    main(["shrink", "--root", str(folder), "--output", str(output), "--shorter", "120"])
    said = capsys.readouterr()
    assert "7 of 9 images" in said.out and "times as fast" in said.out
    assert all(f"left out, since it cannot be read: {folder / name}" in said.out + said.err for name in ("broken.jpg", "text.jpg"))
    sizes = {str(path.relative_to(output)): Image.open(path).size for path in output.rglob("*.*g")}
    assert sizes == {"cats/turned.jpg": (160, 120), "large.png": (120, 160), "palette.png": (120, 160), "gray.jpg": (120, 160),
                     "small.jpg": (90, 70)}  # fmt: skip
    for name in ("small.jpg", "deep.tif", "many.npy"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    assert Image.open(output / "cats" / "turned.jpg").info["icc_profile"] == b"profile"
    for name, tolerance in (("cats/turned.jpg", 6), ("large.png", 1), ("gray.jpg", 6)):  # as the whole, made smaller
        whole = Image.fromarray(read_image(folder / name)).resize(sizes[name], Image.Resampling.BICUBIC)
        assert np.abs(read_image(output / name).astype(int) - np.asarray(whole)).mean() < tolerance
    assert not list(output.rglob(".*")), "nothing half written"

    (output / "gray.jpg").unlink()
    (output / "large.png").write_bytes(b"mine")
    main(["shrink", "--root", str(folder), "--output", str(output), "--shorter", "120"])
    assert Image.open(output / "gray.jpg").size == (120, 160) and (output / "large.png").read_bytes() == b"mine", "it goes on"


@pytest.mark.parametrize("arguments, message", [
    (["--output", "photos/small"], "must lie outside of each other"),
    (["--output", "."], "must lie outside of each other"),
    (["--output", "small", "--shorter", "0"], "shorter must be at least 1 pixel, got 0"),
    (["--output", "small", "--quality", "100"], "quality must lie between 1 and 95, got 100"),
])  # fmt: skip
def test_what_would_harm_is_refused(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["shrink", "--root", "photos", *arguments])
    assert message in capsys.readouterr().err
