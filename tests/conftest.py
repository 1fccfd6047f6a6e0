"""What the tests share: the reference's golden numbers, and a few real image files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

torch.set_num_threads(1)  # the networks here are tiny: threads would only wait for each other

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_seed_of_another_test():
    """Lightning keeps the seed of a run in the environment, where later modules would find it."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


class Golden:
    """One file of golden numbers: ``golden["key"]`` is a tensor, ``golden.part("prefix.")`` a state dict."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, key: str) -> torch.Tensor:
        array = torch.from_numpy(np.asarray(self._arrays[key]))
        return array.float() if array.dtype == torch.float16 else array

    def item(self, key: str):
        return self._arrays[key].item()

    def names(self, key: str) -> list[str]:
        return self._arrays[key].tolist()

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self._arrays.files if key.startswith(prefix)}


@pytest.fixture
def golden():
    return Golden


def write_images(folder: Path, count: int, size: tuple[int, int] = (80, 60), first: int = 0) -> Path:
    """``count`` JPEG photographs of a kind: a coloured disc on a gradient, each with its own colours."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        disc = (x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2 < (min(size) / 3) ** 2
        ground = np.stack([255 * x / width, 255 * y / height, np.full_like(x, rng.integers(256))], axis=-1)
        picture = np.where(disc[..., None], rng.integers(0, 256, 3), ground) + rng.normal(0, 8, (height, width, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=92)
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """A folder of 24 JPEG images."""
    return write_images(tmp_path / "images", 24)


def write_labelled(folder: Path) -> Path:
    """folder/images: 18 to train on, 7 queries, of two classes, so that neither divides by two ranks and batches of 4."""
    for split, counts in (("train", (11, 7)), ("val", (4, 3))):
        for i, count in enumerate(counts):
            write_images(folder / "images" / split / f"class{i}", count, first=20 * i + (100 if split == "val" else 0))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two checkpoints of ``dino-lightning fit``: a ViT of 2 blocks, width 24, 32-pixel crops, from two seeds."""
    from dino_lightning.cli import main

    root = tmp_path_factory.mktemp("checkpoints")
    write_images(root / "images", 4)
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1}
    data = {"root": str(root / "images"), "batch_size": 4, "num_workers": 0, "global_crops_size": 32, "local_crops_number": 0}
    backbone = {"class_path": "dino_lightning.VisionTransformer", "init_args": vit}
    model = {"backbone": backbone, "out_dim": 64, "hidden_dim": 32, "warmup_epochs": 0}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    (root / "small.yaml").write_text(yaml.safe_dump({"data": data, "model": model, "trainer": trainer}))
    for seed in "01":
        folder = ("--trainer.default_root_dir", str(root / seed))
        main(["fit", "--config", str(root / "small.yaml"), "--seed_everything", seed, *folder])
    return [str(next((root / seed).rglob("last.ckpt"))) for seed in "01"]


@pytest.fixture(scope="session")
def small_checkpoint(checkpoints):
    """The first of them."""
    return checkpoints[0]


def two_colours(root: Path, counts: tuple[int, int] = (8, 4)) -> Path:
    """Class folders a and b of red and of blue images, for training and queries."""
    for split, count in zip(("train", "val"), counts):
        for name, colour in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (48, 40), tuple(c + 4 * i for c in colour)).save(folder / f"{i}.jpg")
    return root
