"""Images in containers of others: tar files of WebDataset, datasets of Hugging Face."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning import MultiCropDataModule
from dino_lightning.data import HuggingFaceImages, Tars, UnreadableImage


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def views_of(dataset, num_workers):
    data = MultiCropDataModule(
        dataset=dataset, batch_size=2, num_workers=num_workers, global_crops_size=16, local_crops_number=0, max_unreadable=1.0
    )  # fmt: skip
    data.setup("fit")
    return [(batch.crops[0], batch.labels, batch.unreadable) for batch in data.train_dataloader()]


@pytest.fixture
def tars(tmp_path):
    for number in range(2):
        files: dict[str, bytes] = {}
        for i in (3, 1, 2):  # in no order
            key = f"./photos.of/{number}{i}"
            files |= {
                f"{key}.cls": str(i).encode(),
                f"{key}.seg.png": png(99),
                f"{key}.jpg.json": b"{}",
                f"{key}.png": png(10 * number + i),
            }
        write_tar(tmp_path / f"{number}.tar", files | {"._of_a_mac.png": b"", "notes.txt": b"text"})
    return tmp_path / "*.tar"


def test_tars_are_their_images(tars):
    source = Tars(str(tars))
    assert len(source) == 6 and source.shard_ends.tolist() == [0, 3, 6]
    for i, number in enumerate((1, 2, 3, 11, 12, 13)):
        image, label = pickle.loads(pickle.dumps(source))[i]
        assert np.array_equal(image, pixels(number)) and label == number % 10
    assert source.path(-1) == f"{tars.parent}/1.tar/./photos.of/13.png"
    for mine, others in zip(views_of(source, 0), views_of(source, 2), strict=True):
        assert torch.equal(mine[0], others[0]) and torch.equal(mine[1], others[1])


def test_broken_tars_and_images_are_named(tars, tmp_path):
    write_tar(tmp_path / "2.tar", {"a.jpg": b"no image", "b.png": png(1)})
    (line,) = {line for _, _, lines in views_of(Tars(str(tars)), 0) for line in lines}
    assert line.startswith(f"{tmp_path}/2.tar/a.jpg: not an image")
    whole = (tmp_path / "0.tar").read_bytes()
    for data, words in (
        (whole[:4700], "is cut off|no plain, whole tar"),
        (b"text", "no plain, whole tar file"),
        (whole[:512] + bytes(99), "no plain"),
    ):
        (tmp_path / "torn.tar").write_bytes(data)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{words}|no images in 1 tar"):
            Tars([str(tmp_path / "torn.tar")])
    write_tar(tmp_path / "packed.tar", {"a.png": png(1)}, "w:gz")
    with pytest.raises(ValueError, match="unpack a compressed one"):
        Tars([str(tmp_path / "packed.tar")])
    with pytest.raises(FileNotFoundError, match="no images in 0 tar files .*check the pattern"):
        Tars(str(tmp_path / "nothing" / "*.tar"))


def test_a_dataset_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string")}
    )
    rows = {
        "picture": [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)] + [{"bytes": b"no image", "path": "bad.png"}, None],
        "kind": [0, 1, 0, 1, 0, 0],
        "text": ["a"] * 6,
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    files = {"data_files": str(tmp_path / "rows.parquet"), "image": "picture"}
    source = HuggingFaceImages("parquet", label="kind", **files)
    assert len(source) == 6 and source.classes == ["cat", "dog"]
    for i in range(4):
        image, label = source[i]
        assert np.array_equal(image, pixels(i)) and label == i % 2
    assert HuggingFaceImages("parquet", **files)[1][1] == -1
    for i, words in ((4, "row 4 .bad.png.: not an image"), (5, "row 5 .no name.: the row has no image")):
        with pytest.raises(UnreadableImage, match=words):
            source[i]
    for mine, others in zip(views_of(source, 0), views_of(source, 2), strict=True):
        assert torch.equal(mine[0], others[0]) and mine[2] == others[2]
    for options, words in (
        ({"label": "kinds"}, "no column 'kinds', but picture, kind, text"),
        ({"image": "kind"}, "'kind' of parquet holds no images"),
    ):
        with pytest.raises(ValueError, match=words):
            HuggingFaceImages("parquet", **files | options)
