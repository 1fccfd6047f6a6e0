"""A golden training run, replayed by a real Trainer with a plain DataLoader; as a script, one rank of two."""

import os
import sys

import torch
from conftest import Golden
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from dino_lightning import DINOModule, VisionTransformer

OPTIONS = ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "momentum_teacher", "warmup_teacher_temp",
           "teacher_temp", "warmup_teacher_temp_epochs", "freeze_last_layer", "clip_grad", "out_dim", "hidden_dim",
           "bottleneck_dim", "norm_last_layer", "student_temp", "center_momentum", "optimizer")  # fmt: skip


class Recorder(Callback):
    """The loss of every micro-batch, and of every optimizer step the schedules as applied and the centre after it."""

    def __init__(self) -> None:
        self.losses, self.lr, self.weight_decay, self.momentum, self.centers = [], [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        if trainer.global_step > len(self.centers):
            group = trainer.optimizers[0].param_groups[0]
            self.lr.append(group["lr"])
            self.weight_decay.append(group["weight_decay"])
            self.momentum.append(trainer.callback_metrics["train/momentum"].item())
            module.state_dict()  # as a callback that saves; the centre has moved then
            self.centers.append(module.loss.center[0].clone())


def build_module(golden: Golden) -> DINOModule:
    vit = {name: golden.item(f"vit.{name}") for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    module = DINOModule(
        backbone=VisionTransformer(**vit),
        drop_path_rate=0.0,
        **{name: golden.item(f"config.{name}") for name in OPTIONS},
    )
    for network in (module.student, module.teacher):
        network.load_state_dict(golden.part("init."))
    return module


def build_loader(golden: Golden, batch_size: int, rank: int = 0, world: int = 1) -> DataLoader:
    """The golden batches in order; a rank of several gets its share of each."""
    n_views = 2 + golden.item("config.local_crops")
    samples = []
    for i in range(golden.item("config.niter")):
        views = [golden[f"batch{i}.crop{j}"] for j in range(n_views)]
        samples += [list(sample) for sample in zip(*views)][rank::world]
    return DataLoader(samples, batch_size=batch_size)


def train(golden: Golden, loader: DataLoader, **options) -> tuple[DINOModule, Recorder]:
    module, recorder = build_module(golden), Recorder()
    replay(golden, module, recorder, loader, **options)
    return module, recorder


def replay(golden: Golden, module, recorder: Callback, loader: DataLoader, ckpt_path=None, callbacks=(), **options) -> None:
    trainer = Trainer(
        callbacks=[recorder, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=len(callbacks) > 0,
        **{"max_epochs": golden.item("config.epochs"), "accelerator": "cpu", "devices": 1, **options},
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    for name in names:
        numbers = Golden(name)
        rank = int(os.environ.get("LOCAL_RANK", 0))  # Lightning starts this script again for rank 1
        trained, record = train(
            numbers,
            build_loader(numbers, 2, rank, world=2),
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            use_distributed_sampler=False,
        )
        torch.save({"state": trained.state_dict(), "losses": record.losses}, f"{out}/{name}{trained.global_rank}.pt")
