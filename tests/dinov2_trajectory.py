"""A golden run of DINOv2, replayed by a real Trainer with a plain DataLoader, in one process or as one of two ranks."""

import os

import torch
from conftest import Golden
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from trajectory import replay, two_ranks

from dino_lightning import DINOv2Module, VisionTransformer

OPTIONS = ("out_dim", "hidden_dim", "bottleneck_dim", "head_layers", "dino_loss_weight", "koleo_loss_weight", "ibot_loss_weight",
           "ibot_separate_head", "ibot_out_dim", "ibot_hidden_dim", "ibot_bottleneck_dim", "centering", "momentum_teacher",
           "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "student_temp", "center_momentum", "min_lr",
           "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad", "layerwise_decay", "patch_embed_lr_mult")  # fmt: skip
LOSSES = ("loss", "dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss")
SCHEDULES = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp")


class GoldenMasks(DINOv2Module):
    """DINOv2Module with the masks of the golden batches."""

    golden: Golden

    def draw_masks(self, n_crops: int, grid: tuple[int, int]) -> torch.Tensor:
        ranks = self.trainer.world_size  # of the golden run, or one that has all images
        share = self.golden.item("config.batch_size") * self.golden.item("config.world_size") // ranks
        batch, start = divmod(self.key[2] * self.trainer.train_dataloader.batch_size, share)  # in the epoch, of a rank's images
        masks = self.golden[f"batch{batch}.masks"].unflatten(0, (2, -1))
        start += self.global_rank * share
        return masks[:, start : start + n_crops // 2].flatten(0, 1)


class Recorder(Callback):
    """Of every micro-batch the losses; of every optimizer step the schedules and norms as they were, and the centres after it."""

    def __init__(self) -> None:
        self.losses = {name: [] for name in LOSSES}
        self.steps = {name: [] for name in SCHEDULES}
        self.norms, self.centers = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name in LOSSES:
            self.losses[name].append(outputs[name].item() if name in outputs else 0.0)
        if trainer.global_step > len(self.norms):
            logged = trainer.callback_metrics
            for name in SCHEDULES:
                self.steps[name].append(logged[f"train/{name}"].item())
            self.norms.append([logged[f"train/grad_norm_{part}"].item() for part, _ in module.student.named_children()])
            module.state_dict()  # as a callback that saves; the centres have moved then
            self.centers.append([buffer[0].clone() for name, buffer in module.named_buffers() if name.endswith("center")])


def build_module(golden: Golden, **options) -> GoldenMasks:
    vit = {name: golden.item(f"vit.{name}") for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    backbone = VisionTransformer(
        **vit,
        layer_scale=golden.item("vit.init_values"),
        ffn=golden.item("vit.ffn_layer"),
        registers=golden.item("vit.num_register_tokens"),
        mask_token=True,
    )
    images = golden.item("config.batch_size") * golden.item("config.world_size")
    assert abs(golden.item("config.base_lr") * (images / 1024) ** 0.5 - golden.item("config.lr")) < 1e-12
    given = {name: golden.item(f"config.{name}") for name in OPTIONS}
    given |= {"lr": golden.item("config.base_lr"), "freeze_last_layer": golden.item("config.freeze_last_layer_epochs"), **options}
    module = GoldenMasks(backbone, drop_path_rate=0.0, **given)
    module.golden = golden
    for network in (module.student, module.teacher):
        network.load_state_dict(golden.part("init."))
    return module


def build_loader(golden: Golden, batch_size: int, rank: int = 0) -> DataLoader:
    """The golden batches in order; of several ranks each gets its run of images of every batch, alone one has them all."""
    share, n_views = max(batch_size, golden.item("config.batch_size")), 2 + golden.item("config.local_crops")
    samples = []
    for i in range(golden.item("config.niter")):
        views = [golden[f"batch{i}.crop{j}"] for j in range(n_views)]
        samples += [list(sample) for sample in zip(*views)][rank * share : (rank + 1) * share]
    return DataLoader(samples, batch_size=batch_size)


def train(golden: Golden, loader: DataLoader, module=None, **options) -> tuple[GoldenMasks, Recorder]:
    module, recorder = module or build_module(golden), Recorder()
    replay(golden, module, recorder, loader, **options)
    return module, recorder


def train_on_two_ranks(run: str, **options) -> dict:
    """What one of two real processes ends with."""
    golden, rank = Golden(run), int(os.environ.get("LOCAL_RANK", 0))
    loader = build_loader(golden, golden.item("config.batch_size"), rank)
    module, recorder = train(golden, loader, module=build_module(golden, **options), **two_ranks())
    return {"state": module.state_dict(), "losses": recorder.losses, "norms": recorder.norms, "key": module.key}


def assert_same_losses(losses: dict[str, torch.Tensor], golden: Golden) -> None:
    for name, ours in zip(("loss", "loss.dino_global", "loss.dino_local", "loss.ibot"), LOSSES):
        torch.testing.assert_close(losses[ours], golden[name].double(), rtol=1e-5, atol=0)
    koleo = golden.item("config.koleo_loss_weight") * losses["koleo_loss"]
    torch.testing.assert_close(koleo, golden["loss.koleo"].double(), rtol=1e-4, atol=1e-6)
