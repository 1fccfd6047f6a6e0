"""What the tests share: the reference's golden numbers, and a few real image files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the networks here are tiny: threads would only wait for each other

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One file of golden numbers: ``golden["key"]`` is a tensor, ``golden.part("prefix.")`` a state dict."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, key: str) -> torch.Tensor:
        array = torch.from_numpy(np.asarray(self._arrays[key]))
        return array.float() if array.dtype == torch.float16 else array

    def item(self, key: str):
        return self._arrays[key].item()

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


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """The path of a checkpoint of ``dino-lightning fit``: a ViT of width 24 and 2 blocks for images of 32×32, hardly trained."""
    from dino_lightning.cli import main

    folder = tmp_path_factory.mktemp("small")
    write_images(folder / "images", 4)
    main([
        "fit", "--data.root", str(folder / "images"), "--data.batch_size", "4", "--data.num_workers", "0",
        "--data.global_crops_size", "32", "--data.local_crops_number", "0",
        "--model.backbone", "dino_lightning.VisionTransformer", "--model.backbone.img_size", "32",
        "--model.backbone.patch_size", "8", "--model.backbone.embed_dim", "24", "--model.backbone.depth", "2",
        "--model.backbone.num_heads", "2", "--model.backbone.drop_path_rate", "0.1", "--model.out_dim", "16",
        "--model.hidden_dim", "16", "--model.warmup_epochs", "0", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", str(folder), "--trainer.logger", "false", "--trainer.enable_model_summary", "false",
    ])  # fmt: skip
    return str(folder / "checkpoints" / "last.ckpt")


def two_colours(root: Path, counts: tuple[int, int] = (8, 4)) -> Path:
    """Class folders a and b of red and of blue images, for training and queries."""
    for split, count in zip(("train", "val"), counts):
        for name, colour in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (48, 40), tuple(c + 4 * i for c in colour)).save(folder / f"{i}.jpg")
    return root
