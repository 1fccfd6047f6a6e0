"""Draws docs/views.png: the views of one image as the student sees them.  python docs/views.py IMAGE"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_lightning import MultiCropDataModule
from dino_lightning.data import read_image
from dino_lightning.data.views import TrainingViews, collate_views


def main(path: str) -> None:
    class One(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return read_image(path)

    data = MultiCropDataModule(dataset=One(), mean=(0, 0, 0), std=(1, 1, 1))
    batch = collate_views([TrainingViews(One(), data.multicrop, in_chans=3, seed=1)[0]])
    views = [(view[0] * 255).round().byte().permute(1, 2, 0).numpy() for view in data.paint(batch)]
    photo = Image.open(path).convert("RGB")
    photo = photo.resize((round(photo.width * 224 / photo.height), 224), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (photo.width + 2 * 224 + 4 * 106 + 2 * 10 + 50, 244), "white")
    canvas.paste(photo, (10, 10))
    left = photo.width + 30
    for i, view in enumerate(views[:2]):
        canvas.paste(Image.fromarray(view), (left + i * 234, 10))
    left += 2 * 234 + 10
    for i, view in enumerate(views[2:]):
        canvas.paste(Image.fromarray(np.ascontiguousarray(view)), (left + i % 4 * 106, 10 + i // 4 * 128))
    canvas.save(Path(__file__).with_name("views.png"))


if __name__ == "__main__":
    main(sys.argv[1])
