"""Does memory creep, does throughput fade? A long run on two ranks with worker processes, and the slope of both.

    python benchmarks/soak.py [--minutes 45] [--output soak.csv]

Trains the quickstart's network on generated scenes, two gloo processes of one worker each, with validation and checkpoints every
epoch, and samples every ten seconds the memory of each process (proportional set size without mapped files) and the optimizer
steps done. After a quarter of the time (until then, the ranks' and the workers' memory part ways), straight lines through the
samples: their slopes with 95 % intervals, of independent samples (block means of a minute). The throughput means something only on
a machine that does nothing else; for one whose clock is shared with others, it is given also relative to how long a fixed piece
of work takes at the same time. Linux only.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

_SAMPLE, _BLOCK = 10, 60  # seconds


class StepFile(Callback):
    """The number of steps done, in a file that the parent reads."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            self.file.write_text(str(trainer.global_step))


def train(folder: Path, minutes: float) -> None:
    """One rank; Lightning starts the other."""
    from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
    from dino_lightning.callbacks import AttentionMaps
    from dino_lightning.data import Scenes

    seed_everything(0)
    data = MultiCropDataModule(
        dataset=Scenes(512), batch_size=16, num_workers=1, global_crops_size=48, local_crops_size=24, local_crops_number=4
    )
    backbone = VisionTransformer(img_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=6)
    module = DINOModule(backbone=backbone, out_dim=256, hidden_dim=256, bottleneck_dim=64, warmup_epochs=1)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=100_000,
        max_time={"minutes": minutes}, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StepFile(folder / "step"), ModelCheckpoint(folder / "checkpoints", save_last=True), AttentionMaps(every_n_epochs=5)],
    )  # fmt: skip
    trainer.fit(module, data)


def processes(root: int) -> dict[str, int]:
    """name → pid of the process and all below it, in the order in which they came; helpers of Python and torch aside."""
    names, queue = {}, [(root, "rank 0")]
    while queue:
        pid, name = queue.pop(0)
        names[name] = pid
        try:
            children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            continue
        for i, child in enumerate(children):
            try:
                command = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            if "soak.py" not in command:
                continue
            is_rank = pid == root and Path(f"/proc/{child}/environ").read_bytes().find(b"\0LOCAL_RANK=1") >= 0 and "rank 1" not in names
            queue.append((child, "rank 1" if is_rank else f"{name}, child {i}"))
    return names


def megabytes(pid: int) -> float:
    """Its share of what is not a file: the pages of libraries count by how many other processes happen to use them."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup if line.startswith("Pss")}
    return (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) / 1024


def yardstick() -> float:
    """Seconds that a fixed piece of work takes, at its fastest of ten times."""
    numbers, times = np.random.default_rng(0).random(50_000), []
    for _ in range(10):
        start = time.perf_counter()
        np.sort(numbers)
        times.append(time.perf_counter() - start)
    return min(times)


def slope(times: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Of a line through block means: (per hour, half of the 95 % interval)."""
    blocks = (times // _BLOCK).astype(int)
    t, v = (np.array([x[blocks == b].mean() for b in np.unique(blocks)]) for x in (times / 3600, values))
    (gradient, _), covariance = np.polyfit(t, v, 1, cov=True)
    return gradient, 1.96 * covariance[0, 0] ** 0.5


def soak(minutes: float, output: str) -> None:
    with tempfile.TemporaryDirectory() as scratch, open(output, "w", newline="", buffering=1) as file:
        writer = csv.writer(file)
        writer.writerow(("seconds", "process", "megabytes", "step", "yardstick"))
        run = subprocess.Popen([sys.executable, __file__, "--run", scratch, "--minutes", str(minutes)])
        start, rows = time.monotonic(), []
        while run.poll() is None:
            time.sleep(_SAMPLE)
            step, now, work = Path(scratch, "step"), round(time.monotonic() - start, 1), yardstick()
            for name, pid in processes(run.pid).items():
                try:
                    rows.append((now, name, round(megabytes(pid), 2), int(step.read_text() or 0), work))
                except (OSError, ValueError, KeyError):
                    continue  # not yet, or no longer there
                writer.writerow(rows[-1])
    late = [row for row in rows if 15 * minutes < row[0] < 60 * minutes]  # not the end, at which all is taken down
    for name in sorted({row[1] for row in late}):
        samples = np.array([(row[0], row[2]) for row in late if row[1] == name])
        if len(samples) < 0.8 * len({row[0] for row in late}):
            continue  # short-lived
        change, interval = slope(*samples.T)
        print(f"{name:20} {samples[:, 1].mean():8.0f} MB {change:+8.1f} ± {interval:.1f} MB an hour")
    steps = np.array(sorted({(row[0], row[3], row[4]) for row in late if row[1] == "rank 0"}))
    rate, work = np.diff(steps[:, 1]) / np.diff(steps[:, 0]), (steps[1:, 2] + steps[:-1, 2]) / 2
    for name, values in (("throughput", rate), ("relative to the machine", rate * work)):
        change, interval = slope(steps[1:, 0], values / values.mean() * 100)
        print(f"{name:24} {change:+.1f} ± {interval:.1f} % an hour")
    print(f"{rate.mean():.2f} steps/s, the fixed piece of work {1000 * work.mean():.2f} ms; {run.returncode=}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--output", default="soak.csv")
    parser.add_argument("--run", type=Path, help="be one of the ranks, in this folder")
    args = parser.parse_args()
    if args.minutes < 6:
        parser.error(f"--minutes must be at least 6 for lines through block means of a minute, got {args.minutes:g}")
    if args.run:
        train(args.run, args.minutes)
    else:
        soak(args.minutes, args.output)
