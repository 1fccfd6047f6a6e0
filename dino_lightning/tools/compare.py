"""``dino-lightning compare``: methods side by side on the same images, each for the same time."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.methods import METHODS, home
from dino_lightning.tools import run_log
from dino_lightning.tools.checkpoint import load_module
from dino_lightning.tools.comparison_page import Result, as_markdown, as_page
from dino_lightning.tools.folders import labelled_folders
from dino_lightning.tools.knn import knn
from dino_lightning.tools.linear import linear
from dino_lightning.tools.training import best_of_last, hushed

_BANK = 10_000  # images of the bank while a run goes on: with more, a large set would leave time for few points of the curve


def compare(
    root: str,
    methods: tuple[str, ...] = ("dino", "dinov2", "simclr", "byol", "moco_v3", "mae"),
    minutes: float = 20.0,
    output: str = "comparison",
    image_size: int | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    seed: int = 0,
) -> list[Result]:
    """Trains methods one after the other on the same images, each for the same time, and says what their features are worth.

    Each is ``fit --config auto`` with two views of an image (MAE: each is a sample), the same backbone (of a small network MAE, which needs
    patches, has a ViT), AdamW, and a schedule that ends with its time. On a CPU, and for small images, all have a small network and one
    learning rate; on a GPU a ViT-S/16, at the rates of ``auto``. A run that was interrupted goes on where it was when
    the command is given again, and what is done is not done again.

    Short runs favour other methods than long ones, and no method is tuned here: read it as "on these images, in this time".

    Args:
        root: folder with train/ and a folder of queries (val/, validation/ or test/), each with class folders; labels are for the
            evaluation alone.
        methods: names of ``fit --method``.
        minutes: of each run, validation included.
        output: folder for the runs, ``comparison.md`` and the page ``index.html``.
        image_size: pixels of the views' side; by default what ``auto`` takes for the first method.
        batch_size: images of a step; by default what ``auto`` takes.
        num_workers: worker processes of each run; by default as many as ``fit`` takes.
        seed: of weights, order and augmentation.

    Returns:
        A result for each method, also printed as a table and written.

    Raises:
        ValueError: for a method that there is not, no time, or images without labels.
        RuntimeError: if a run failed; its own message is above.
    """
    for method in methods:
        home(method)
    if not minutes > 0 or not methods:
        raise ValueError(f"give at least one of the methods {', '.join(METHODS)} and some minutes, got {methods} and {minutes:g}")
    train, _ = labelled_folders(root, None, 3)
    if batch_size and batch_size > len(train):
        raise ValueError(f"batch_size={batch_size} is more than the {len(train)} images of {train.root}; give a smaller one")
    results = []
    for number, method in enumerate(methods, start=1):
        folder = Path(output) / method
        done = folder / "result.json"
        if not done.exists():
            print(
                f"{method} ({number} of {len(methods)}): {minutes:g} minutes, and the evaluation; its log is {folder / 'fit.log'}",
                flush=True,
            )
            data = {"root": os.path.abspath(root), "global_crops_size": image_size, "batch_size": batch_size, "num_workers": num_workers}
            _train(folder, method, minutes, {name: value for name, value in data.items() if value is not None}, seed)
            done.write_text(json.dumps(_judge(folder, method, root, minutes)._asdict()), encoding="utf-8")
        image_size = image_size or _config(folder)["data"]["global_crops_size"]
        results.append(Result(**json.loads(done.read_text(encoding="utf-8"))))
    text = as_markdown(results)
    about = f"{len(train)} images of {root}, {image_size}×{image_size} pixels, {minutes:g} minutes each, seed {seed}"
    (Path(output) / "comparison.md").write_text(f"{about}\n\n{text}\n", encoding="utf-8")
    (Path(output) / "index.html").write_text(as_page(about, results), encoding="utf-8")
    print(f"{about}\n\n{text}\n\nthe page is {Path(output) / 'index.html'}")
    return results


def _train(folder: Path, method: str, minutes: float, data: dict[str, Any], seed: int) -> None:
    """Runs fit in a process of its own; goes on where an earlier one was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder.resolve()), "name": "log"}}
    trainer = {"logger": json.dumps(logger), "default_root_dir": folder.resolve(), "log_every_n_steps": 10, "devices": 1}
    data = {**data, "local_crops_number": 0, "global_crops_scale": "[0.25,1.0]", "max_bank": _BANK}
    options = {f"{group}.{name}": value for group, of in (("data", data), ("trainer", trainer)) for name, value in of.items()}
    options |= {"method": method, "seed_everything": seed, "config": "auto"}
    again = {"ckpt_path": "last"} if list(folder.glob("**/checkpoints/last*.ckpt")) else {"minutes": minutes}
    megabytes = _fit(folder / "fit.log", [f"--{name}={value}" for name, value in (options | again).items()])
    (folder / "memory.json").write_text(json.dumps(megabytes), encoding="utf-8")


def _config(folder: Path) -> dict[str, Any]:
    """Of the run in a method's folder."""
    return yaml.safe_load((_run(folder) / "config.yaml").read_text(encoding="utf-8"))


def _run(folder: Path) -> Path:
    """The newest, where one was cut off before it could be gone on with."""
    return max(folder.glob("log/version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def _fit(written: Path, options: Sequence[str]) -> float:
    """The most megabytes that the process had. What it says is written, and nothing on the screen.

    Raises:
        RuntimeError: if it failed.
    """
    with open(written, "a", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, "-m", "dino_lightning", "fit", *options], stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = written.read_text(encoding="utf-8").strip().splitlines()[-3:]
        raise RuntimeError(f"fit {' '.join(options)} failed; the end of {written}:\n" + "\n".join(said))
    return used.ru_maxrss / 1024


def _judge(folder: Path, method: str, root: str, minutes: float) -> Result:
    rows = run_log.rows(_run(folder))
    rates = [float(row["train/images_per_s"]) for row in rows if row.get("train/images_per_s")]
    validated = [row for row in rows if row.get("val/knn_top1")]
    last = max(int(row["step"]) for row in rows) or 1
    curve = [(minutes * int(row["step"]) / last, float(row["val/knn_top1"])) for row in validated]
    checkpoint = max(folder.glob("**/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    with hushed(errors=True):
        top1, _ = knn(str(checkpoint), root, k=(20,))["trained"][0]
        found = linear(str(checkpoint), root)["trained"]
    backbone = load_module(str(checkpoint)).evaluated.backbone
    return Result(
        method,
        top1,
        best_of_last(found),
        float(validated[-1]["val/rank_me"]),
        statistics.median(rates),
        json.loads((folder / "memory.json").read_text(encoding="utf-8")),
        sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
        curve,
    )
