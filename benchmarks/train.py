"""End to end through Lightning's Trainer, on a folder of images: images/s, the share of waiting for data, peak memory, MFU.

    python benchmarks/train.py FOLDER [--arch vit_tiny] [--k 4096] [--batch 8] [--steps 20] [--workers 1] [--precision 32-true]

Three variants over the same networks, loader and painting: a loop written by hand, the Trainer, and the Trainer with what the command
line adds (doctor, throughput, signals, checkpoints within an epoch, a CSV logger). Steps are timed from the end of the second one: on a
GPU by the wall clock, on a CPU by the processor's time of this process, in one thread beside the workers.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from pairing import compare, interleaved, parser, peak_mb, save, seconds
from step import ours, whole_step

from dino_lightning import DINOModule, MultiCropDataModule
from dino_lightning.callbacks import CollapseDoctor, SaveEvery, StopOnSignal, Throughput
from dino_lightning.training.loggers import AppendingCSVLogger

WARM = 2  # steps that are not timed


class Clock(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == WARM:
            self.started = seconds(module.device)

    def on_train_end(self, trainer, module):
        self.ended = seconds(module.device)


def by_hand(args, data: MultiCropDataModule, device: torch.device) -> float:
    """Seconds of a step."""
    step = whole_step(ours(args.arch, args.k, 0.1, device), args.precision.removesuffix("-mixed").removesuffix("-true"), device)
    for i, batch in enumerate(data.train_dataloader()):
        views, _ = data.transfer_batch_to_device(batch, device, 0)
        step(views)
        if i + 1 == WARM:
            started = seconds(device)
        if i + 1 == args.steps:
            break
    return (seconds(device) - started) / (args.steps - WARM)


def by_trainer(args, data: MultiCropDataModule, device: torch.device, with_callbacks: bool, told: dict[str, float]) -> float:
    """Seconds of a step; what the callbacks measured goes into ``told``."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        ours_too = [CollapseDoctor(), Throughput(), StopOnSignal(), SaveEvery(10.0)] if with_callbacks else []
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision=args.precision, max_epochs=1,
            limit_train_batches=args.steps, limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=with_callbacks, default_root_dir=folder, callbacks=[clock, *ours_too],
            logger=AppendingCSVLogger(folder) if with_callbacks else False,
        )  # fmt: skip
        trainer.fit(DINOModule(args.arch, out_dim=args.k, compile=args.compile), data)
        told.update({name: value.item() for name, value in trainer.callback_metrics.items() if name in TOLD})
    return (clock.ended - clock.started) / (args.steps - WARM)


TOLD = ("train/images_per_s", "train/data_wait", "train/tflops", "train/mfu")


if __name__ == "__main__":
    arguments = parser(__doc__, others=False)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--arch", default="vit_tiny", choices=["vit_tiny", "vit_small", "vit_base"])
    arguments.add_argument("--k", type=int, default=4096)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = arguments.parse_args()
    if args.device.type == "cpu":
        torch.set_num_threads(1)
    data = MultiCropDataModule(args.folder, batch_size=args.batch, num_workers=args.workers)
    data.setup("fit")
    needed = args.steps * args.batch
    if len(data.train_dataloader().dataset) < needed:
        raise SystemExit(f"{args.folder} has fewer than {needed} images (steps × batch)")
    told: dict[str, float] = {}
    variants: dict[str, Callable[[], float]] = {
        "by hand": lambda: by_hand(args, data, args.device),
        "Trainer": lambda: by_trainer(args, data, args.device, False, {}),
        "Trainer, with callbacks": lambda: by_trainer(args, data, args.device, True, told),
    }
    found = interleaved(variants, args.rounds)
    title = f"seconds of a step, {args.arch}, K = {args.k:,}, batch {args.batch}, {args.precision}, {args.device.type}"
    results = {"summary": compare(title, found, "s", base="by hand"), "told": told, "peak MB": peak_mb(args.device), "rounds": found}
    print({name: round(value, 4) for name, value in told.items()}, f"peak memory {results['peak MB']:.0f} MB")
    save(args.json, results)
