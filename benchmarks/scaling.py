"""The published runs of DINO and DINOv2 on paper, on 1 to 512 H100s, and what our formulas make of the times that were published.

    python benchmarks/scaling.py            # writes benchmarks/scaling.md
    python benchmarks/scaling.py --memory   # prints the table of docs/how-to/devices.md

Everything comes from ``dino-lightning estimate``; nothing is run.
"""

import functools
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dino_lightning.evaluation.gpus import device
from dino_lightning.tools.costs import Run, run_of
from dino_lightning.tools.estimate import Estimate, estimated

FILE = Path(__file__).with_suffix(".md")
MFU, WORKER_MS = 0.35, 4.4
IMAGENET = 1_281_167  # images of ImageNet-1k
DEVICES = (1, 8, 64, 512)
GIB = 2**30

_CROPS = ["--data.local_crops_number", "10", "--trainer.precision", "bf16-mixed"]
_DINOV2 = ["--method", "dinov2", "--trainer.precision", "bf16-mixed", "--data.global_crops_scale", "[0.32, 1.0]"]
_LARGE_14 = [
    "--model.patch_size", "14", "--model.ffn", "swiglu", "--model.drop_path_rate", "0.4", "--model.centering", "sinkhorn_knopp",
    "--model.out_dim", "131072", "--model.bottleneck_dim", "384", "--model.ibot_separate_head", "true",
    "--model.ibot_out_dim", "131072", "--data.local_crops_size", "98",
]  # fmt: skip

# A network and its images a step, with its options; the runs are so many images in all.
RUNS = {
    "DINO ViT-S/16": (1024, ["--model.backbone", "vit_small", *_CROPS]),
    "DINO ViT-B/16": (1024, ["--model.backbone", "vit_base", *_CROPS]),
    "DINO ViT-S/8": (1024, ["--model.backbone", "vit_small", "--model.patch_size", "8", *_CROPS]),
    "DINO ViT-B/8": (1024, ["--model.backbone", "vit_base", "--model.patch_size", "8", *_CROPS]),
    "DINOv2 ViT-L/16": (2048, _DINOV2),
    "DINOv2 ViT-L/14": (3072, [*_DINOV2, *_LARGE_14]),
}
LENGTHS = {
    "DINO ViT-S/16": {"300 epochs": 300 * IMAGENET, "800 epochs": 800 * IMAGENET},
    "DINOv2 ViT-L/16": {"125,000 steps": 125_000 * 2048},
    "DINOv2 ViT-L/14": {"625,000 steps": 625_000 * 3072},
}
_LENGTH = {"300 epochs": 300 * IMAGENET}  # of the others


class Published(NamedTuple):
    """A run whose time was published: ``images`` in all, in so many ``hours``; ``memory`` as it was published."""

    what: str
    options: list[str]
    gpu: str
    devices: int
    images: float
    hours: float
    memory: str
    source: str


def _paper(local: int, hours: float, memory: str) -> Published:
    options = ["--data.local_crops_number", str(local), "--trainer.precision", "16-mixed"]
    return Published(
        f"ViT-S/16, 100 epochs, 2 + {local} crops", options, "v100-32", 16, 100 * IMAGENET, hours, memory, "DINO's paper, table 8"
    )


PUBLISHED = [
    _paper(0, 15.3, "9.3 GB"),
    _paper(6, 20.3, "–"),
    _paper(10, 24.2, "15.4 GB"),
    Published(
        "ViT-S/16, 100 epochs, 2 + 8 crops", ["--trainer.precision", "16-mixed"], "v100-32", 8, 100 * 2502 * 512, 2502 * 100 * 0.617 / 3600,
        "13,871 MB", "dino#69 (GPUs taken for V100s): 0.617 s a step",
    ),
    Published(
        "DINOv2 ViT-L/16, 125,000 steps", [*_DINOV2, "--data.batch_size", "64"], "a100-80", 32, 125_000 * 2048, 24, "–",
        "DINOv2's model card: a day",
    ),
    Published(
        "DINOv2 ViT-L/14, 625,000 steps", [*_DINOV2, *_LARGE_14, "--data.batch_size", "32"], "a100-80", 96, 625_000 * 3072, 3.3 * 24, "–",
        "DINOv2's model card: 3.3 days",
    ),
]  # fmt: skip

BATCHES = {
    "vit_tiny": 16, "small_images": 64, "vit_small": 64, "vit_base": 32, "vit_base_8": 6, "resnet50": 64,
    "dinov2_small_images": 64, "dinov2_vit_small": 128, "dinov2_vit_large": 64,
}  # fmt: skip


@functools.cache
def _run(batch: int, *options: str) -> Run:
    return run_of([*options, "--data.batch_size", str(batch)])


def on(devices: int, images: int, options: list[str]) -> Estimate:
    """A network with so many images a step, in as few micro-batches as fit."""
    share = images // devices

    def micro(batch: int) -> Estimate:
        run = _run(batch, *options)
        step = run.step._replace(devices=devices, accumulated=share // batch)
        return estimated(run._replace(step=step), device("h100"), MFU, WORKER_MS)

    whole = micro(share)
    return whole if whole.fits else micro(max(n for n in range(1, whole.largest_batch + 1) if share % n == 0))


def rows_of(name: str) -> list[str]:
    """A network's rows of the table."""
    images, options = RUNS[name]
    rows = []
    for devices in DEVICES:
        found = on(devices, images, options)
        step = found.run.step
        batch = f"{step.batch} × {step.accumulated}" if step.accumulated > 1 else f"{step.batch}"
        lengths = LENGTHS.get(name, _LENGTH)
        times = ", ".join(f"{length}: {_time(total / found.images_per_s / 3600)}" for length, total in lengths.items())
        cells = (
            f"{name}, {images:,} a step", f"{step.flops / 1e9:,.0f}", devices, batch, f"{found.memory.total / GIB:.1f}",
            f"{found.images_per_s:,.0f}", times, found.workers, f"{found.bound} ({found.most_devices:,})",
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def scaling() -> str:
    rows = [
        "| network | GFLOP an image | H100s | images a device | GiB a device | images/s | time | workers a device | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(rows + [row for name in RUNS for row in rows_of(name)])


def published() -> str:
    rows = [
        "| published run | on | time | memory a GPU | our GFLOP an image | our GiB | MFU that explains the time | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in PUBLISHED:
        gpu, run = device(one.gpu), run_of(one.options, one.devices)
        mfu = one.images * run.step.flops / (one.hours * 3600 * one.devices * gpu.half * 1e12)
        cells = (
            one.what, f"{one.devices} {gpu.title.split()[0]}s", f"{one.hours:.3g} h", one.memory, f"{run.step.flops / 1e9:,.0f}",
            f"{run.step.memory().total / GIB:.1f}", f"{mfu:.3f}", one.source,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


SENT = {
    **{f"DINO {name}": ["--model.backbone", name] for name in ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant", "resnet50")},
    "DINOv2 vit_large": ["--method", "dinov2", "--model.backbone", "vit_large"],
    "DINOv2 vit_giant": ["--method", "dinov2", "--model.backbone", "vit_giant"],
}


def sent(names: Iterable[str] = SENT) -> str:
    rows = ["| network, K = 65,536 | parameters trained, millions | DDP, 8 devices, MB | 512 devices | sharded, 8 devices | 512 devices |"]
    rows.append("|---|---|---|---|---|---|")
    for name in names:
        step = _run(64, *SENT[name], "--trainer.precision", "bf16-mixed").step
        megabytes = [step._replace(devices=n, sharded=sharded).sent_bytes() / 1e6 for sharded in (False, True) for n in (8, 512)]
        rows.append(f"| {name} | {step.trainable / 1e6:,.0f} | {' | '.join(f'{value:,.0f}' for value in megabytes)} |")
    return "\n".join(rows)


def memory_table(names: Iterable[str] = BATCHES) -> list[str]:
    """The lines of the table of memory in docs/how-to/devices.md."""
    rows = [
        "| recipe | images a GPU | weights, gradients, moments, teacher | activations | logits and loss | in all, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        memory = run_of(["--config", name, "--data.batch_size", str(BATCHES[name])]).step.memory()
        held = memory.parameters + memory.teacher + memory.gradients + memory.optimizer + memory.half_weights
        parts = (held, memory.activations + memory.images, memory.logits + memory.loss, memory.total)
        rows.append(f"| `{name}` | {BATCHES[name]} | {' | '.join(f'{part / GIB:.1f}' for part in parts)} |")
    return rows


def page() -> str:
    return f"""# Scale on paper

**Estimates. Nothing here was run on a GPU.** Made by `python benchmarks/scaling.py` from the formulas of `dino-lightning
estimate` (`dino_lightning/evaluation/estimate.py`), which tests compare with counted operations and with what autograd keeps.
One row by itself:

```bash
dino-lightning estimate --model.backbone vit_small --data.local_crops_number 10 --trainer.precision bf16-mixed --trainer.max_epochs 300 \\
  --data.batch_size 128 --devices 8 --gpu h100 --images 1281167
```

## The published runs on H100s

Assumed: an MFU of {MFU} in bfloat16 whatever the batch; {WORKER_MS} ms of a worker for an image (README.md beside, a photograph of
400×533) and as many workers as that takes; NVLink within 8 GPUs, 400 Gb/s for each GPU beyond; what is slowest hides the rest.
A few images a device will not reach that MFU: with fewer than about 16 read the images a second as a bound from above. What
does not fit is accumulated ("512 × 2": two micro-batches). Behind what bounds a step, in brackets: with how many devices the
network would begin to, at 400 Gb/s and the same images a step. DINO with 10 local crops; 300 epochs of the networks but
ViT-S/16 are what others report or our recipe, since the authors' arguments are not in their repository. DINOv2's ViT-L/14 has
two heads of 131,072 prototypes and Sinkhorn.

{scaling()}

## What a device sends in a step

Around a ring, float32, of one micro-batch with crops of two sizes: gradients and centres added up (`--trainer.strategy ddp`); or, where each
device has its share of the weights only (`sharded`), the weights for each pass through them and the gradients to where they belong. It does
not depend on the images. Accumulated batches cost DDP nothing more, shards as many times as they are.

{sent()}

## What was published, and the MFU that would explain it

A check of plausibility, not of precision: the times are rounded, and what their machines waited for is not known. MFU is of 125
TFLOP/s of a V100 and 312 of an A100, by the operations of our code; the reference computes all tokens of the last block where
we compute the class token, 6 to 7 % more. It also keeps attention's scores and more in its loss: its memory is not ours.

{published()}

DINO's times are a tenth of a V100's peak, less than a third of what the first table assumes of an H100, for reasons that these
numbers do not tell (attention that is not fused, small kernels, data). DINOv2's agree with each other and with the {MFU}; but
its commands evaluate step 25,000 of ViT-L/16, and if the day was of these, its MFU was a fifth of the table's. What our code
reaches on a GPU is to be measured: a run logs `train/mfu`. At 0.1 the times that compute bounds are 3.5 times as long.
"""


if __name__ == "__main__":
    logging.getLogger("dino_lightning").setLevel(logging.ERROR)
    if sys.argv[1:] == ["--memory"]:
        print("\n".join(memory_table()))
    else:
        FILE.write_text(page(), encoding="utf-8")
