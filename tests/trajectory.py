"""A golden training run, replayed by a real Trainer with a plain DataLoader, in one process or as one of two ranks."""

import os

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


def two_ranks() -> dict:
    """A Trainer's options on two real processes, of which Lightning starts the second."""
    return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "use_distributed_sampler": False}


def train_on_two_ranks(run: str) -> dict:
    """What one of them ends with."""
    golden, rank = Golden(run), int(os.environ.get("LOCAL_RANK", 0))
    module, recorder = train(golden, build_loader(golden, 2, rank, world=2), **two_ranks())
    return {"state": module.state_dict(), "losses": recorder.losses}


def assert_same_end(state: dict[str, torch.Tensor], golden: Golden, key_bias: float = 1e-5) -> None:
    for network in ("student", "teacher"):
        expected_state = golden.part(f"final.{network}.")
        assert len(expected_state) > 20
        for key, expected in expected_state.items():
            got = state[f"{network}.{key}"]
            if key.endswith("qkv.bias"):
                # The softmax ignores the bias of the keys: its gradient is rounding noise, of which AdamW makes whole steps.
                torch.testing.assert_close(got, expected, rtol=0, atol=key_bias)
                got, expected = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (got, expected))
            error = (got - expected).norm() / expected.norm()
            assert not error > 1e-4, f"{network}.{key} is off by {error:.2e}"
