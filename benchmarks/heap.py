"""Does a run leak? What its heap holds over many epochs, told from what the allocator keeps free.

    python benchmarks/heap.py [--epochs 1000]

Trains the quickstart's network in one process, one step an epoch, with a checkpoint every epoch, pictures every fifth and the
default logger: what happens once an epoch happens often. Prints the heap in use and the memory of the process; at the end the growth
of the first in the second half of the run, and what is left of the second when the allocator hands back what is free. Linux with
glibc 2.33 or newer only.
"""

import argparse
import ctypes
import gc
import os
import tempfile
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from soak import megabytes

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import AttentionMaps
from dino_lightning.data import Scenes

_SAMPLES = 50


class Mallinfo2(ctypes.Structure):
    """glibc's, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Mallinfo2


def in_use() -> float:
    """Megabytes that are allocated and not freed."""
    info = libc.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


class Heap(Callback):
    """Samples at the same place of every n-th epoch."""

    def __init__(self, every: int) -> None:
        self.every, self.samples = every, []

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch % self.every == 0:
            gc.collect()
            self.samples.append((trainer.current_epoch, in_use(), megabytes(os.getpid())))
            print("epoch {:6}: {:8.2f} MB in use, {:8.1f} MB of the process".format(*self.samples[-1]), flush=True)


def main(epochs: int) -> None:
    seed_everything(0)
    data = MultiCropDataModule(
        dataset=Scenes(16), batch_size=16, num_workers=0, global_crops_size=48, local_crops_size=24, local_crops_number=4
    )
    backbone = VisionTransformer(img_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=6)
    module = DINOModule(backbone=backbone, out_dim=256, hidden_dim=256, bottleneck_dim=64, warmup_epochs=1)
    heap = Heap(max(1, epochs // _SAMPLES))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=folder, enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[heap, AttentionMaps(every_n_epochs=5), ModelCheckpoint(Path(folder) / "checkpoints", save_last=True)],
        )  # fmt: skip
        trainer.fit(module, data)
    late = np.array([sample for sample in heap.samples if sample[0] >= epochs / 2])
    (growth, _), covariance = np.polyfit(late[:, 0], late[:, 1] * 1024, 1, cov=True)
    print(f"heap in use: {growth:+.2f} ± {1.96 * covariance[0, 0] ** 0.5:.2f} KB an epoch")
    libc.malloc_trim(0)
    print(
        f"the process: {late[0, 2]:.0f} MB halfway, {late[-1, 2]:.0f} MB at the end, without what is free {megabytes(os.getpid()):.0f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1000)
    main(parser.parse_args().epochs)
