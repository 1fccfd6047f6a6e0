"""What only a GPU can show: equal pixels, no waiting, precisions, runs that repeat themselves. Skipped without one."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.backbones.prototypes import Prototypes
from dino_lightning.callbacks import CollapseDoctor, Throughput
from dino_lightning.methods.dinov2 import DINOv2Module

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def train(module_class=DINOModule, backbone=None, callbacks=(), steps=10, **options):
    """A short run on one GPU, with painting, drop path and the doctor; the losses of its steps and the module."""
    seed_everything(0)
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 80, 80), dtype=np.uint8)) for _ in range(8 * steps)]
    data = MultiCropDataModule(dataset=images, batch_size=8, num_workers=0, global_crops_size=64, local_crops_size=32, seed=0)
    masked = module_class is DINOv2Module
    backbone = backbone or VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=1, drop_path_rate=0.1, mask_token=masked
    )
    module = module_class(backbone, out_dim=256, hidden_dim=64, bottleneck_dim=32, warmup_epochs=0, lr=1e-3)
    recorder = Losses()
    trainer = Trainer(accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, callbacks=[recorder, Throughput(), CollapseDoctor(), *callbacks], **options)  # fmt: skip
    trainer.fit(module, data)
    return torch.stack(recorder.losses).cpu(), module


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())


class NoWaiting(Callback):
    """From the third step on, whatever waits for the device within a step is an error."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx >= 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", [DINOModule, DINOv2Module])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits_for_the_device(method, precision):
    losses, _ = train(method, callbacks=[NoWaiting()], steps=12, precision=precision)
    assert len(losses) == 12 and losses.isfinite().all()


def test_half_precisions_follow_float32():
    full, _ = train()
    for precision in ("bf16-mixed", "16-mixed"):
        half, _ = train(precision=precision)
        torch.testing.assert_close(half, full, rtol=0.01, atol=0.01)


def test_a_run_repeats_itself_to_the_bit():
    (losses, module), (again, same) = train(precision="bf16-mixed"), train(precision="bf16-mixed")
    assert torch.equal(losses, again)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_compiled_run_follows_an_eager_one():
    class Compiled(DINOModule):
        def on_fit_start(self):
            self.compile()

    eager, _ = train(backbone=VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=1))
    compiled, _ = train(Compiled, backbone=VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=1))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


def test_logits_come_in_float32_from_factors_in_half():
    layer = Prototypes(64, 4096).cuda()
    x = nn.functional.normalize(torch.randn(32, 64, device="cuda"), dim=1)
    exact = layer.double()(x.double())
    layer = layer.float()
    with torch.autocast("cuda", torch.bfloat16):
        logits = layer(x)
    rounded = (x.bfloat16() @ (layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)).bfloat16().T).double()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().mean() < 0.6 * (rounded - exact).abs().mean(), "more exact than a product that gives bfloat16"
    logits.square().sum().backward()
    assert layer.weight_v.grad.isfinite().all()


def test_synchronized_batch_norms_on_one_rank():
    backbone = nn.Sequential(nn.Conv2d(3, 32, 5, stride=4), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    losses, _ = train(backbone=backbone, strategy="ddp", sync_batchnorm=True)
    assert losses.isfinite().all()
