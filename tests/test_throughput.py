"""How fast a run is: counted operations, and time that is measured."""

import logging
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from dino_lightning import DINOHead, DINOModule, SimCLRModule, VisionTransformer
from dino_lightning.callbacks import Throughput, throughput
from dino_lightning.callbacks.throughput import peak_of
from dino_lightning.evaluation.flops import flops_per_image
from dino_lightning.methods.networks import Network, Teacher


def test_operations_of_vit_small_as_counted_by_hand():
    """2 crops of 224 and 8 of 96, K = 65,536: 113.4 GFLOP with all tokens in the last block, of which the teacher 18.4 and its head."""
    with torch.device("meta"):
        backbone = VisionTransformer(embed_dim=384, num_heads=6)
        student = Network(backbone, DINOHead(384, 65536))
        teacher = Teacher(student)
        views = [torch.empty(1, 3, 224, 224)] * 2 + [torch.empty(1, 3, 96, 96)] * 8
    # Per token but the class token, the last block saves the output's projection, the MLP and attention: 18 D² + 4 T D.
    saved = [(tokens - 1) * (18 * 384**2 + 4 * tokens * 384) for tokens in (197, 37)]
    expected = 113.4e9 - 3 * (2 * saved[0] + 8 * saved[1]) - 2 * saved[0]
    assert flops_per_image(student, teacher, views) == pytest.approx(expected, rel=0.005)
    assert student.training and not teacher.training


def test_local_views_that_simclr_leaves_out_are_no_operations():
    module = SimCLRModule("shufflenet_v2_x0_5", img_size=32, hidden_dim=8, projection_dim=8)
    views = [torch.rand(1, 3, 32, 32)] * 2
    assert module.flops_per_image([*views, torch.rand(1, 3, 16, 16)]) == module.flops_per_image(views) > 0


def test_mfu_is_of_our_table(caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    assert peak_of("NVIDIA H200", "bf16-mixed") == 989.4e12 and peak_of("NVIDIA L40S", "16-mixed") == 362e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "32-true") == 19.5e12 and not caplog.messages
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_of("NVIDIA A100-SXM4-80GB", "32-true") == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")
    assert peak_of("Tesla T4", "bf16-mixed") is None and peak_of("NVIDIA H100 NVL", "bf16-mixed") is None
    assert [message.split(" is not in")[0] for message in dict.fromkeys(caplog.messages)] == [
        f"no train/mfu in this run: the peak of {name} in torch.bfloat16" for name in ("Tesla T4", "NVIDIA H100 NVL")
    ]
    logging.getLogger("lightning.pytorch").removeHandler(caplog.handler)


class Slow(Dataset):
    """Samples that take a while to read."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return [torch.rand(3, 16, 16)] * 2


class Clock(Callback):
    """When the last epoch began, and when its last step was done."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ended = time.perf_counter()


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_waiting_for_data_is_told_from_computing(seconds, monkeypatch):
    monkeypatch.setattr(throughput, "_SECONDS", float("inf"))  # one reading, at the epoch's end
    module = DINOModule(
        VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2), out_dim=16, hidden_dim=16,
        bottleneck_dim=8, warmup_epochs=0,
    )  # fmt: skip
    before, after = Clock(), Clock()  # its own clock starts and stops between theirs
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=False, callbacks=[before, Throughput(), after],
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, DataLoader(Slow(seconds), batch_size=2))
    rate, wait, tflops = (trainer.callback_metrics[f"train/{name}"].item() for name in ("images_per_s", "data_wait", "tflops"))
    shortest, longest = before.ended - after.began, after.ended - before.began  # of the epoch's steps alone
    assert 8 / longest * (1 - 1e-6) <= rate <= 8 / shortest * (1 + 1e-6)
    if seconds:
        assert wait > 0.5 and rate < 1 / seconds
    assert wait / rate >= 0.7 * seconds  # of an image; the first batch is read before the clock starts
    assert 0 <= wait < 1 and tflops > 0 and "train/mfu" not in trainer.callback_metrics
