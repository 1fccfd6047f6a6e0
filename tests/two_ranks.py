"""Scenarios for two real processes (``python two_ranks.py FOLDER SCENARIO...``), and the same in one (``train``)."""

import os
import sys
from pathlib import Path

import dinov2_trajectory
import torch
import torch.nn.functional as F
import trajectory
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from dino_lightning import DINOModule, DINOv2Module, MAEModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import CollapseDoctor, OnlineKNN, OnlineProbe, SaveEvery


class PoisonLastRank(Callback):
    """One weight of the last rank becomes NaN before its third step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            batch[0][0].fill_(torch.nan)


class Uneven(MultiCropDataModule):
    """A user's own loader, whose last batch is smaller: the images in order, each to one of the ranks."""

    def train_dataloader(self):
        torch.manual_seed(0)
        samples = [[torch.rand(3, 64, 64), torch.rand(3, 64, 64), torch.rand(3, 48, 48)] for _ in range(10)]
        return DataLoader(samples[self.trainer.global_rank :: self.trainer.world_size], batch_size=self.batch_size)


class SumOfRanks(torch.autograd.Function):
    """Each rank's loss depends on the sum, so the gradient is the sum of the ranks' as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOfRanks.forward(ctx, gradient)


class SyncOnCPU(nn.BatchNorm2d):
    """nn.SyncBatchNorm runs on GPUs only; this one has the same statistics and gradients on any device."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        rest, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        count = SumOfRanks.apply(x.new_tensor(x.numel() / x.shape[1]))
        mean = SumOfRanks.apply(x.sum(rest)) / count
        var = SumOfRanks.apply((x - mean.view(shape)).square().sum(rest)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = (x - mean.view(shape)) / (var + self.eps).sqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


class SyncOnCPUs(LayerSync):
    """What Trainer(sync_batchnorm=True) does, with layers that run on CPUs."""

    def apply(self, model: nn.Module) -> nn.Module:
        return self._swap(model, nn.BatchNorm2d, SyncOnCPU)

    def revert(self, model: nn.Module) -> nn.Module:
        return self._swap(model, SyncOnCPU, nn.BatchNorm2d)

    @staticmethod
    def _swap(model: nn.Module, old: type, new: type) -> nn.Module:
        for part in model.modules():
            if type(part) is old:
                part.__class__ = new
        return model


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def train(
    folder: Path,
    batch_size: int,
    callbacks=(),
    drop_path_rate=0.0,
    num_workers=0,
    ckpt_path=None,
    backbone=None,
    uneven=False,
    teacher_temp=0.04,
    method="dino",
    recomputed=False,
    **options,
) -> dict:
    """Trains on folder/images; the state, the losses and the metrics at the end."""
    seed_everything(0)
    data = (Uneven if uneven else MultiCropDataModule)(
        folder / "images", batch_size=batch_size, num_workers=num_workers, global_crops_size=32, local_crops_size=16,
        local_crops_number=2,
    )  # fmt: skip
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_path_rate=drop_path_rate)
    arguments = {"img_size": 32, "out_dim": 64, "hidden_dim": 32, "warmup_epochs": 1, "lr": 0.05, "activation_checkpointing": recomputed}
    if method == "mae":
        module = MAEModule(vit, img_size=32, decoder_dim=16, decoder_depth=1, decoder_heads=2, warmup_epochs=1)
    elif method == "dinov2":
        module = DINOv2Module(
            VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mask_token=True), **arguments
        )
    else:
        module = DINOModule(backbone or vit, teacher_temp=teacher_temp, warmup_teacher_temp=teacher_temp, **arguments)
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=not uneven, callbacks=[losses, OnlineKNN(k=3), *callbacks],
        **{"max_epochs": 2, "logger": False, "enable_checkpointing": False, "default_root_dir": folder, **options},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in module.state_dict().items()}
    probes = [callback.state_dict() for callback in callbacks if isinstance(callback, OnlineProbe)]
    return {"state": state, "losses": losses.values, "metrics": metrics, "probes": probes}


RESNET = {"backbone": "resnet18", "uneven": True, "precision": "64-true", "max_epochs": 1, "limit_val_batches": 0}

# What differs from a plain run on batches of 2 images.
SCENARIOS = {
    "fit": {},
    "accumulate": {"batch_size": 1, "accumulate_grad_batches": 2, "limit_train_batches": 8},
    "uneven": {"uneven": True},
    "resume": {"ckpt_path": "step=3.ckpt"},
    "probe": {"callbacks": [OnlineProbe()]},
    "cnn": {"backbone": "resnet18"},
    "saving": {"callbacks": [SaveEvery(1e-9)], "max_epochs": 8},
    "sharded": {"strategy": "sharded", "enable_checkpointing": True},
    "sharded, resumed": {
        "strategy": "sharded",
        "ckpt_path": "step=3.ckpt",
        "batch_size": 1,
        "accumulate_grad_batches": 2,
        "limit_train_batches": 8,
    },
    "mae": {"method": "mae"},
    "mae, sharded": {"method": "mae", "strategy": "sharded"},
    "dinov2": {"method": "dinov2"},
    "dinov2, sharded": {"method": "dinov2", "strategy": "sharded", "recomputed": True},
    "synced": {**RESNET, "plugins": [SyncOnCPUs()]},
    "sick": {"callbacks": [CollapseDoctor(stop=True)], "teacher_temp": 2.0, "max_epochs": 30},
    "nan": {"callbacks": [PoisonLastRank()]},
}

# Golden runs, on the batches of the reference's two ranks.
GOLDEN = {
    "adamw": lambda: trajectory.train_on_two_ranks("trajectory_adamw"),
    "sgd": lambda: trajectory.train_on_two_ranks("trajectory_sgd"),
    "golden dinov2": lambda: dinov2_trajectory.train_on_two_ranks("dinov2/trajectory_two_ranks"),
    "golden dinov2 without KoLeo": lambda: dinov2_trajectory.train_on_two_ranks("dinov2/trajectory_two_ranks", koleo_loss_weight=0.0),
}


def run(folder: Path, scenario: str) -> dict:
    if scenario in GOLDEN:
        return GOLDEN[scenario]()
    options = {"batch_size": 2, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), **SCENARIOS[scenario]}
    if scenario == "sharded":
        options["callbacks"] = [ModelCheckpoint(folder / "sharded", "{step}", every_n_train_steps=1, save_top_k=-1)]
    if "ckpt_path" in options:
        options["ckpt_path"] = folder / options["ckpt_path"]
    return train(folder, **options)


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        result = run(Path(sys.argv[1]), scenario)
        torch.save(result, f"{sys.argv[1]}/{scenario}{os.environ.get('LOCAL_RANK', 0)}.pt")
