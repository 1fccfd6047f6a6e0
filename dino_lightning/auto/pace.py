"""How fast a run is: it is begun in a process of its own, and stopped after some seconds."""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PATIENCE = 600  # seconds for what comes before and after: imports, the listing of images
_INSTEAD = "give --trainer.max_epochs instead of --minutes, or smaller batches"


def images_per_second(args: Sequence[str], seconds: int) -> float:
    """Images a second, over all devices, of ``dino-lightning fit`` with these arguments, without validation; measured for so many seconds, at
    most 59.

    Raises:
        ValueError: if it fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder}}
        trial = {
            "logger": logger,
            "default_root_dir": folder,
            "max_epochs": 10**6,
            "max_time": f"00:00:00:{seconds:02d}",
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "callbacks": None,
            "enable_progress_bar": False,
        }
        options = [f"--trainer.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in trial.items()]
        command = [sys.executable, "-m", "dino_lightning", "fit", *args, *options]
        quiet = {**os.environ, "WANDB_MODE": "disabled"}
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet, timeout=seconds + _PATIENCE
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"the trial of --config auto did not end within {error.timeout:.0f} s; {_INSTEAD}") from error
        log = next(Path(folder).glob("**/metrics.csv"), None)
        if done.returncode or log is None:
            said = [line for line in done.stdout.strip().splitlines() if not line.startswith("(--debug")][-2:]
            told = "\n".join(line.removeprefix("dino-lightning: error: ") for line in said)
            raise ValueError(f"--config auto could not see how fast this run is, its trial ended: {told}")
        with open(log, newline="", encoding="utf-8") as file:
            rates = [float(row["train/images_per_s"]) for row in csv.DictReader(file) if row.get("train/images_per_s")]
    rates = list(dict.fromkeys(rates))  # a reading stands in every line until the next
    if not rates:
        raise ValueError(f"the trial of --config auto made no two steps in {seconds} s; {_INSTEAD}")
    return statistics.median(rates[1:] or rates)
