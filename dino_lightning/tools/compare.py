"""``dino-lightning compare``: methods side by side on the same images, each for the same time."""

import contextlib
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from dino_lightning.data import ImageFolder
from dino_lightning.methods import METHODS, home
from dino_lightning.tools.checkpoint import load_module
from dino_lightning.tools.comparison_page import page, table
from dino_lightning.tools.folders import labelled_folders
from dino_lightning.tools.linear import linear

_POINTS = 12  # validations of a run
_TRIAL = 20  # steps that tell how fast a method is


class Result(NamedTuple):
    """Of a method.

    Attributes:
        method: its name.
        knn: top-1 of 20 neighbours after the run, as a fraction.
        linear: top-1 of the best linear classifier, as a fraction.
        rank: RankMe of the bank's features.
        images_per_s: of training.
        megabytes: the most that the process had in memory.
        parameters: of the backbone, in millions.
        curve: (minutes of training, k-NN top-1), from the untrained network on.
    """

    method: str
    knn: float
    linear: float
    rank: float
    images_per_s: float
    megabytes: float
    parameters: float
    curve: list[tuple[float, float]]


def compare(
    root: str,
    methods: tuple[str, ...] = ("dino", "dinov2", "simclr", "byol", "moco_v3", "mae"),
    minutes: float = 20.0,
    output: str = "comparison",
    backbone: Literal["small_resnet", "small_vit"] = "small_resnet",
    image_size: int | None = None,
    batch_size: int = 128,
    num_workers: int | None = None,
    seed: int = 0,
) -> list[Result]:
    """Trains methods one after the other on the same images, each for the same time, and says what their features are worth.

    All have two views of an image (MAE: each is a sample), the same backbone (MAE, which needs patches: a small ViT) and AdamW at one
    learning rate, on schedules that end with their time; validation is not counted. A run that was interrupted goes on where it was
    when the command is given again, and what is done is not done again.

    Short runs favour other methods than long ones, and no method is tuned here: read it as "on these images, in this time".

    Args:
        root: folder with train/ and a folder of queries (val/, validation/ or test/), each with class folders; labels are for the
            evaluation alone.
        methods: names of ``fit --method``.
        minutes: of training, each.
        output: folder for the runs, ``comparison.md`` and the page ``index.html``.
        backbone: small_resnet, or small_vit for all of them.
        image_size: pixels of the views' side; by default the images' own up to 64, or up to 128 on a GPU.
        batch_size: images of a step.
        num_workers: worker processes of each run; by default as many as ``fit`` takes.
        seed: of weights, order and augmentation.

    Returns:
        A result for each method, also printed as a table and written.

    Raises:
        ValueError: for a method that there is not, or no time.
        RuntimeError: if a run failed; its own message is above.
    """
    for method in methods:
        home(method)
    if not minutes > 0 or not methods:
        raise ValueError(f"give at least one of the methods {', '.join(METHODS)} and some minutes, got {methods} and {minutes:g}")
    train, _ = labelled_folders(root, None, 3)
    if len(train) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(train)} images of {train.root}; give a smaller one")
    size = image_size or _usual_size(train)
    shared = {"root": os.path.abspath(root), "batch_size": batch_size, "global_crops_size": size, "num_workers": num_workers}
    results = []
    for number, method in enumerate(methods, start=1):
        folder = Path(output) / method
        done = folder / "result.json"
        if not done.exists():
            print(f"{method} ({number} of {len(methods)}): {minutes:g} minutes, and the evaluation; its log is {folder / 'recipe.log'}", flush=True)
            _train(folder, _recipe(method, shared, backbone, seed), minutes, len(train) // batch_size)
            done.write_text(json.dumps(_judge(folder, method, root, minutes)._asdict()), encoding="utf-8")
        results.append(Result(**json.loads(done.read_text(encoding="utf-8"))))
    text = table(results)
    about = f"{len(train)} images of {root}, {size}×{size} pixels, {minutes:g} minutes each, seed {seed}"
    (Path(output) / "comparison.md").write_text(f"{about}\n\n{text}\n", encoding="utf-8")
    (Path(output) / "index.html").write_text(page(about, results), encoding="utf-8")
    print(f"{about}\n\n{text}\n\nthe page is {Path(output) / 'index.html'}")
    return results


def _usual_size(images: ImageFolder) -> int:
    """The images' own size in steps of 16, up to 64 (with a GPU 128)."""
    chosen = range(0, len(images), max(1, len(images) // 32))
    shorter = statistics.median(min(images[index][0].shape[:2]) for index in chosen)
    return max(16, min(int(shorter) // 16 * 16, 128 if torch.cuda.is_available() else 64))


def _recipe(method: str, shared: dict[str, Any], backbone: str, seed: int) -> dict[str, Any]:
    size = shared["global_crops_size"]
    vit = backbone == "small_vit" or method == "mae"
    if vit:
        kind, options = "VisionTransformer", {"patch_size": max(1, size // 8), "embed_dim": 192, "depth": 6, "num_heads": 3, "img_size": size}
        options |= {"mask_token": True} if method == "dinov2" else {}
    else:
        kind, options = "backbones.small_resnet.SmallResNet", {"stem_stride": min(4, max(1, size // 16))}
    model = {"backbone": {"class_path": f"dino_lightning.{kind}", "init_args": options}, "img_size": size, **_OPTIONS[method]}
    if method == "dinov2" and not vit:
        model["ibot_loss_weight"] = 0.0  # which needs patches
    data = {**shared, "local_crops_number": 0, "global_crops_scale": [0.2, 1.0]}
    if size < 64 and method not in ("mae", "simclr"):
        data["blur_p"] = [0.0, 0.0, 0.0]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": "log"}}
    trainer = {"logger": logger, "log_every_n_steps": 10, "devices": 1}
    return {"method": method, "seed_everything": seed, "data": data, "model": model, "trainer": trainer}


_SMALL = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.04, "weight_decay_end": 0.4}
_SELF_DISTILLED = {"out_dim": 1024, "hidden_dim": 512, "bottleneck_dim": 128, "momentum_teacher": 0.99}
_OPTIONS: dict[str, dict[str, Any]] = {  # for small images and short runs; the same learning rate as applied for all
    "dino": {**_SMALL, **_SELF_DISTILLED, "use_bn_in_head": True},
    # Its rule is the square root: this gives the same rate at 128 images.
    "dinov2": {**_SMALL, **_SELF_DISTILLED, "lr": 2.8e-3, "layer_scale": None, "drop_path_rate": 0.0, "layerwise_decay": 1.0,
               "teacher_temp": 0.04, "warmup_teacher_temp": 0.04},
    "simclr": {**_SMALL, "hidden_dim": 512, "temperature": 0.2},
    "byol": {**_SMALL, "hidden_dim": 512},
    "moco_v3": {**_SMALL, "hidden_dim": 512},
    "mae": {**_SMALL, "decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4},
}  # fmt: skip


def _train(folder: Path, recipe: dict[str, Any], minutes: float, batches: int) -> None:
    """Runs fit in a process of its own; goes on where an earlier one was interrupted. ``batches`` are those of all images."""
    folder.mkdir(parents=True, exist_ok=True)
    written, trial = folder / "recipe.yaml", folder / "trial"
    if not written.exists():
        recipe["trainer"]["default_root_dir"] = str(trial.resolve())
        (folder / "trial.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        _fit(folder / "trial.yaml", "--trainer.limit_train_batches", str(_TRIAL), "--trainer.limit_val_batches", "0",
             "--trainer.max_steps", str(_TRIAL), "--trainer.log_every_n_steps", "1", "--trainer.enable_checkpointing", "false")  # fmt: skip
        rates = [float(row["train/images_per_s"]) for row in _log(trial) if row.get("train/images_per_s")]
        steps = max(_POINTS, round(statistics.median(rates[1:] or rates) * 60 * minutes / recipe["data"]["batch_size"]))
        # An epoch is a twelfth of the run, or all images where they are seen more often than that.
        epoch = min(batches, round(steps / _POINTS))
        epochs = round(steps / epoch)
        recipe["trainer"] |= {
            "limit_train_batches": epoch,
            "max_epochs": epochs,
            "check_val_every_n_epoch": max(1, epochs // _POINTS),
            "default_root_dir": str(folder.resolve()),
        }
        written.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    again = list(folder.glob("**/checkpoints/last*.ckpt"))
    megabytes = _fit(written, *(["--ckpt_path", "last"] if again else []))
    (folder / "memory.json").write_text(json.dumps(megabytes), encoding="utf-8")


def _fit(config: Path, *options: str) -> float:
    """The most megabytes that the process had; nothing of it on the screen but its errors.

    Raises:
        RuntimeError: if it failed.
    """
    command = [sys.executable, "-m", "dino_lightning", "fit", "--config", str(config), *options]
    with open(config.with_suffix(".log"), "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = config.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command)} failed; the end of {config.with_suffix('.log')}:\n" + "\n".join(said))
    return used.ru_maxrss / 1024


def _log(folder: Path) -> list[dict[str, str]]:
    """The rows of the run's log, the oldest first."""
    rows = []
    for path in sorted(folder.glob("log/version_*/metrics.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def _judge(folder: Path, method: str, root: str, minutes: float) -> Result:
    rows = _log(folder)
    rates = [float(row["train/images_per_s"]) for row in rows if row.get("train/images_per_s")]
    validated = [row for row in rows if row.get("val/knn_top1")]
    last = max(int(row["step"]) for row in rows) or 1
    curve = [(minutes * int(row["step"]) / last, float(row["val/knn_top1"])) for row in validated]
    checkpoint = max(folder.glob("**/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = linear(str(checkpoint), root)["trained"]
    backbone = load_module(str(checkpoint)).evaluated.backbone
    return Result(
        method,
        curve[-1][1],
        max(standing.last[0] for standing in found.values()),
        float(validated[-1]["val/rank_me"]),
        statistics.median(rates),
        json.loads((folder / "memory.json").read_text(encoding="utf-8")),
        sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
        curve,
    )
