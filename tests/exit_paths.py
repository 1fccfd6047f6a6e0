"""The ways in which a process that trains can end. Run as ``python exit_paths.py FOLDER NAME...``, it prints what was seen, as JSON.

Each is a process of its own, forked from this one, which has imported torch once, and ends as a script does. They run two at a
time. FOLDER holds images/ and labelled/.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import AttentionMaps, OnlineKNN, SaveEvery, StopOnSignal
from dino_lightning.training.loggers import AppendingCSVLogger

LIMIT = 60  # seconds for one
SAVED = Path("checkpoints/last.ckpt")


def data(root: str = "../images") -> MultiCropDataModule:
    return MultiCropDataModule(root, batch_size=4, num_workers=2, global_crops_size=32, local_crops_number=0)


def fit(*callbacks: Callback, logger=False, root: str = "../images", resume: str | None = None, **options) -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.1)
    torch.manual_seed(0)
    module = DINOModule(vit, out_dim=64, hidden_dim=32, warmup_epochs=0)
    keep = ModelCheckpoint("checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    keep = [keep] if options.get("enable_checkpointing", True) else []
    monitor = (
        [ModelCheckpoint("best", "{step}", "val/knn_top1", save_top_k=-1, save_on_train_epoch_end=False)] if "labelled" in root else []
    )
    options = {"accelerator": "cpu", "max_epochs": 200, "enable_progress_bar": False, "enable_model_summary": False} | options
    trainer = Trainer(callbacks=[*callbacks, StopOnSignal(), *keep, *monitor], logger=logger, log_every_n_steps=1, **options)
    trainer.fit(module, data(root), ckpt_path=resume)


def is_ready() -> None:
    """Tells the parent that its signal may come."""
    Path("ready").touch()


class Ready(Callback):
    """Ready after some steps, each of which takes a while."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            is_ready()
        if trainer.global_step >= 5:
            until = time.monotonic() + self.seconds
            while time.monotonic() < until:
                time.sleep(0.01)


class LongValidation(Callback):
    """Ready within the validation of the second epoch, which then takes long."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == 1 and not trainer.sanity_checking and trainer.ckpt_path is None:
            is_ready()
            time.sleep(1.0)


class Fails(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("of a callback")


class FailsTwice(Fails):
    def on_exception(self, trainer, pl_module, exception):
        raise RuntimeError("of on_exception")


class FillsTheDisk(Callback):
    """From the fifth step on no file may be larger."""

    def __init__(self, size: int = 60_000) -> None:
        self.size = size

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def read_on(fail: bool = False) -> None:
    module = data()
    module.setup("fit")
    batches = iter(module.train_dataloader())
    next(batches)
    if fail:
        raise RuntimeError("of the script")
    globals()["kept"] = batches  # a script's name: it lives until the interpreter ends


def wait_with_workers() -> None:
    read_on()
    is_ready()
    time.sleep(LIMIT)


def killed_after_saving() -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if SAVED.exists() and trainer.global_step % 6 == 4:
                os.kill(os.getpid(), signal.SIGKILL)

    fit(SaveEvery(1e-5), Kill(), logger=CSVLogger(".", "log", ""), max_epochs=3)


def whole(root: str) -> None:
    fit(OnlineKNN(), logger=CSVLogger(".", "log", ""), root=root, max_epochs=3)


def resumed(folder: str, root: str) -> None:
    os.chdir(f"../{folder}")
    logger = AppendingCSVLogger(".", "log", "", first_step=torch.load(SAVED, weights_only=True)["global_step"])
    fit(OnlineKNN(), logger=logger, root=root, resume=str(SAVED), max_epochs=3)


ENDS = {
    "script end": (read_on, ()),
    "script exception": (lambda: read_on(fail=True), ()),
    "callback exception": (lambda: fit(Fails()), ()),
    "on_exception": (lambda: fit(FailsTwice()), ()),
    "full disk, TensorBoard": (lambda: fit(FillsTheDisk(), logger=TensorBoardLogger(".")), ()),
    "full disk, checkpoint": (lambda: fit(FillsTheDisk()), ()),
    "full disk, log": (lambda: fit(FillsTheDisk(20_000), logger=AppendingCSVLogger(".", "log", ""), enable_checkpointing=False), ()),
    "full disk, pictures": (lambda: fit(FillsTheDisk(20_000), AttentionMaps(1), enable_checkpointing=False, max_epochs=3), ()),
    "SIGTERM to a script": (wait_with_workers, (signal.SIGTERM,)),
    "SIGKILL to a script": (wait_with_workers, (signal.SIGKILL,)),
    "SIGTERM": (lambda: fit(Ready()), (signal.SIGTERM,)),
    "SIGINT": (lambda: fit(Ready()), (signal.SIGINT,)),
    "SIGINT twice": (lambda: fit(Ready(LIMIT)), (signal.SIGINT, signal.SIGINT)),
    "SIGTERM in validation": (
        lambda: fit(LongValidation(), OnlineKNN(), logger=CSVLogger(".", "log", ""), root="../labelled", max_epochs=3),
        (signal.SIGTERM,),
    ),
    "SIGKILL": (killed_after_saving, ()),
    "whole": (lambda: whole("../images"), ()),
    "whole, labelled": (lambda: whole("../labelled"), ()),
    "SIGKILL, resumed": (lambda: resumed("SIGKILL", "../images"), ()),
    "SIGTERM in validation, resumed": (lambda: resumed("SIGTERM in validation", "../labelled"), ()),
}


def start(name: str) -> int | None:
    """The process that ends in this way; None in it, which then goes on to the end of the script."""
    Path(name).mkdir()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(name)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    ENDS[name][0]()
    return None


def watch(name: str, pid: int) -> dict:
    """How it ended, after its signals, how long that took, and who was left of its session."""
    signals = ENDS[name][1]
    began = time.monotonic()
    while signals and not (Path(name) / "ready").exists() and time.monotonic() < began + LIMIT:
        time.sleep(0.02)
    time.sleep(0.1)
    for i, number in enumerate(signals):
        time.sleep(1.5 * (i > 0))
        os.kill(pid, number) if number == signal.SIGKILL else os.killpg(pid, number)
    asked, code = time.monotonic(), None
    while code is None and time.monotonic() < began + LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.02)
    seconds = time.monotonic() - asked
    while session(pid) and time.monotonic() < asked + seconds + 5:  # workers of a dead parent look for it every second
        time.sleep(0.05)
    left = session(pid)
    if left:
        os.killpg(pid, signal.SIGKILL)
    return {"code": code, "seconds": seconds, "left": len(left), "said": (Path(name) / "log.txt").read_text()}


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def main() -> None:
    os.chdir(sys.argv[1])
    names, seen = sys.argv[2:], {}
    for i in range(0, len(names), 2):
        pids = {}
        for name in names[i : i + 2]:
            pids[name] = start(name)
            if pids[name] is None:
                return
        seen |= {name: watch(name, pid) for name, pid in pids.items()}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
