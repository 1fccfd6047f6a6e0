"""Milliseconds an image costs a worker (read, crop, decide) and the device (paint), at 2 × 224 + 8 × 96, one thread.

    python benchmarks/views.py FOLDER [--images 64]
"""

import argparse
import time

import torch

from dino_lightning import MultiCropDataModule
from dino_lightning.data.views import collate_views

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = MultiCropDataModule(args.folder, batch_size=16, num_workers=0)
    data.setup("fit")
    views = data.train_dataloader().dataset
    for round_ in range(3):
        start = time.perf_counter()
        samples = [views[(round_, index)] for index in range(args.images)]
        decided = time.perf_counter()
        for i in range(0, args.images, 16):
            data.paint(collate_views(samples[i : i + 16]))
        painted = time.perf_counter()
        worker, device = (1000 * seconds / args.images for seconds in (decided - start, painted - decided))
        print(f"round {round_}: worker {worker:.1f} ms, painting {device:.1f} ms an image")
