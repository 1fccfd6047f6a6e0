"""What a GPU learns in minutes, through `fit --config auto`: k-NN, images a second, memory and MFU, a line for each run.

    python benchmarks/gpu_results.py cifar10 --root CIFAR10 --network cnn --minutes 8 --json cnn.json
    python benchmarks/gpu_results.py cifar10 --root CIFAR10 --network vit --minutes 8 --json vit.json
    python benchmarks/gpu_results.py photographs --root CLOTHING --minutes 8 --json clothing.json
    python benchmarks/gpu_results.py cifar10 --root IMAGES --minutes 0.1 --smoke      # on a CPU: does it run?

ROOT has train/ and a folder of queries with class folders. Where no more than 64 MB may be sent, `dino-lightning shrink` makes photographs
smaller first. `cnn` is of ResNet-18's size: three stages of 128 to 512 channels with two residual blocks each. k-NN: 20 neighbours.
"""

import csv
import json
import statistics
import tempfile
from pathlib import Path

import torch
import yaml
from pairing import parser, peak_mb, save

from dino_lightning.__main__ import main

CNN = {"class_path": "dino_lightning.backbones.small_resnet.SmallResNet", "init_args": {"widths": [64, 128, 256, 512], "blocks": 2}}
VIT = {
    "class_path": "dino_lightning.VisionTransformer",
    "init_args": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 3},
}


def options(args) -> list[str]:
    """Of ``fit``: auto's choices, with what makes the runs of a title alike."""
    chosen = ["--config", "auto", "--minutes", str(args.minutes), "--data.root", str(args.root), "--method", args.method]
    if args.what == "cifar10":
        chosen += ["--model.backbone", json.dumps(CNN if args.network == "cnn" else VIT)]
    if args.smoke:
        chosen += ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    return chosen


def results(folder: Path) -> dict[str, float | str | list]:
    """From the log of a run."""
    run = next(folder.glob("log/*"))
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def last(name: str) -> float | None:
        return next((float(row[name]) for row in reversed(rows) if row.get(name)), None)

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return {
        "k-NN": last("val/knn_top1"),
        "curve": [(int(row["step"]), float(row["val/knn_top1"])) for row in rows if row.get("val/knn_top1")],
        "images/s": statistics.median(float(row["train/images_per_s"]) for row in rows if row.get("train/images_per_s")),
        "waiting for data": last("train/data_wait"),
        "mfu": last("train/mfu"),
        "peak MB": peak_mb(torch.device("cuda" if config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available() else "cpu")),
        "epochs": config["trainer"]["max_epochs"],
        "batch": config["data"]["batch_size"],
        "crops": config["data"]["global_crops_size"],
    }


if __name__ == "__main__":
    arguments = parser(__doc__, others=False)
    arguments.add_argument("what", choices=["cifar10", "photographs"])
    arguments.add_argument("--root", type=Path, required=True)
    arguments.add_argument("--network", choices=["cnn", "vit"], default="cnn", help="for cifar10")
    arguments.add_argument("--method", default="dino")
    arguments.add_argument("--minutes", type=float, default=8.0)
    arguments.add_argument("--smoke", action="store_true", help="on a CPU")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder, "name": "log"}}
        main(["fit", *options(args), "--trainer.logger", json.dumps(logger), "--trainer.default_root_dir", folder])
        found = results(Path(folder))
    print(json.dumps(found), flush=True)
    save(args.json, found)
