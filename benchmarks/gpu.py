"""Everything that waits for a GPU, in one call of at most nine minutes: tests, steps, memory, painting, a run end to end.

    python benchmarks/gpu.py --json gpu.json [--reference PATH]
    python benchmarks/gpu.py --json gpu.json --smoke       # its smallest form, on a CPU: does it run?

What was measured is written after each part, also if a later one fails or the time is up. MFU is of the dense bfloat16 peak.
"""

import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from others import reference
from pairing import parser, save, synchronize
from PIL import Image
from step import LOCAL, ours, random_views, timed, whole_step
from train import by_trainer

from dino_lightning import MultiCropDataModule
from dino_lightning.data.views import collate_views
from dino_lightning.evaluation.flops import flops_per_image
from dino_lightning.evaluation.gpus import device_called


def tests(args) -> dict[str, str | int]:
    """The tests marked cuda, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_cuda.py", "tests/test_painting.py"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    return {"exit code": done.returncode, "output": done.stdout[-3000:]}


def steps(args) -> Iterator[tuple[str, dict[str, float | str]]]:
    """Time, memory and MFU of a training step, eager and (at one batch size) compiled in bfloat16, and of the reference in float16."""
    for arch in args.archs:
        for batch in args.batches:
            views = random_views(batch, args.device)
            forms: dict[str, tuple[Callable, str]] = {"eager": (functools.partial(ours, arch, args.k, 0.1, args.device), "bf16")}
            if args.compiled and batch == args.batches[1]:  # which takes minutes each time
                forms["compiled"] = (functools.partial(ours, arch, args.k, 0.1, args.device, True), "bf16")
            if args.reference:
                forms["reference"] = (functools.partial(reference, args.reference, arch, args.k, 0.1, 2 + LOCAL, args.device), "fp16")
            for name, (build, precision) in forms.items():
                yield f"{arch}, batch {batch}, {name}", step_of(build, precision, views, args)


def step_of(build: Callable, precision: str, views: list[torch.Tensor], args) -> dict[str, float | str]:
    try:
        step = build()
        run = whole_step(step, precision if args.device.type == "cuda" else "32", args.device)
        start = time.perf_counter()
        for _ in range(args.warm):
            run(views)
        synchronize(args.device)
        warm_up = time.perf_counter() - start
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        seconds = statistics.median(timed(run, views, args.device) for _ in range(args.rounds))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    except Exception:  # the other forms are measured all the same
        return {"error": traceback.format_exc()[-1500:]}
    batch = len(views[0])
    found: dict[str, float | str] = {"seconds": seconds, "images/s": batch / seconds, "warm-up seconds": warm_up}
    if hasattr(step.student, "embed"):  # ours
        flops = flops_per_image(step.student, step.teacher, [view[:1] for view in views])
        found["TFLOP/s"] = flops * batch / seconds / 1e12
        if args.peak:
            found["mfu"] = flops * batch / seconds / args.peak
    if args.device.type == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated(args.device) / 1e9
    return found


def painting(args) -> dict[str, float]:
    """Seconds of painting a batch on the device, and the host's part of them."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 300, 400), dtype=np.uint8)) for _ in range(args.batches[0])]
    data = MultiCropDataModule(dataset=images, batch_size=args.batches[0], num_workers=0)
    data.setup("fit")
    views = data.train_dataloader().dataset
    batch = collate_views([views[(0, index)] for index in range(args.batches[0])])
    crops = [crop.to(args.device) for crop in batch.crops]
    host, whole = [], []
    for _ in range(args.rounds + 1):
        synchronize(args.device)
        start = time.perf_counter()
        data.paint(batch._replace(crops=crops))
        host.append(time.perf_counter() - start)
        synchronize(args.device)
        whole.append(time.perf_counter() - start)
    return {"seconds": statistics.median(whole[1:]), "seconds of the host": statistics.median(host[1:])}


def end_to_end(args) -> dict[str, dict[str, float]]:
    """A run on a folder of generated JPEGs, through the Trainer with the command line's callbacks, eager and compiled."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(args.workers or 1) as pool:
            pool.starmap(write_jpegs, [(folder, start, args.jpegs) for start in range(0, args.jpegs, 100)])
        for name in ["eager"] + ["compiled"] * args.compiled:
            told: dict[str, float] = {}
            batch = args.batches[0]
            data = MultiCropDataModule(folder, batch_size=batch, num_workers=args.workers)
            asked = SimpleNamespace(
                arch=args.archs[0], k=args.k, batch=batch, steps=min(args.steps, args.jpegs // batch), compile=name == "compiled",
                precision="bf16-mixed" if args.device.type == "cuda" else "32-true",
            )  # fmt: skip
            seconds = by_trainer(asked, data, args.device, True, told)
            found[name] = {"images/s": batch / seconds, **told}
    return found


def write_jpegs(folder: str, start: int, count: int) -> None:
    """A hundred photographs' worth of smooth noise, 500 × 375."""
    rng = np.random.default_rng(start)
    for index in range(start, min(start + 100, count)):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(os.path.join(folder, f"{index:06}.jpg"), quality=90)


if __name__ == "__main__":
    arguments = parser(__doc__, others=False)
    arguments.add_argument("--reference", type=Path, help="a checkout of facebookresearch/dino, to be timed beside")
    arguments.add_argument("--minutes", type=float, default=9.0, help="no part is begun after nine tenths of them")
    arguments.add_argument("--smoke", action="store_true", help="the smallest form, on a CPU")
    args = arguments.parse_args()
    full = dict(device=torch.device("cuda"), archs=["vit_small", "vit_base"], batches=[64, 128, 256], k=65536, warm=4, jpegs=20_000,
                workers=16, steps=200, compiled=True)  # fmt: skip
    smoke = dict(device=torch.device("cpu"), archs=["vit_tiny"], batches=[2], k=64, warm=1, jpegs=8, workers=0, steps=4, compiled=False)
    for name, value in (smoke if args.smoke else full).items():
        setattr(args, name, value)
    gpu = device_called(torch.cuda.get_device_name()) if args.device.type == "cuda" else None
    args.peak = gpu.peak(torch.bfloat16) if gpu else None
    results: dict[str, object] = {"parts": {}}
    ends = time.monotonic() + 0.9 * 60 * args.minutes

    def part(name: str, work: Callable) -> None:
        if time.monotonic() > ends:
            results["parts"][name] = "no time was left"
        else:
            try:
                results["parts"][name] = work()
            except Exception:  # the other parts are measured all the same
                results["parts"][name] = {"error": traceback.format_exc()[-1500:]}
        print(name, results["parts"][name], flush=True)
        save(args.json, results)

    part("tests", functools.partial(tests, args))
    part("painting", functools.partial(painting, args))
    for name, found in steps(args):
        part(name, lambda found=found: found)
        if time.monotonic() > ends - 120 * (not args.smoke):  # what is left is for the run end to end
            break
    part("end to end", functools.partial(end_to_end, args))
