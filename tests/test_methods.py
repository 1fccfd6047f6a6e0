"""The base of all methods, by the smallest one: without a teacher, a centre or prototypes, in a file of its own."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dino_lightning import SimCLRModule, VisionTransformer
from dino_lightning.callbacks import CollapseDoctor, Throughput
from dino_lightning.methods import METHODS, home, method_class
from dino_lightning.methods.base import Method, plain
from dino_lightning.methods.batch import split_views
from dino_lightning.methods.networks import Network
from dino_lightning.training.guard import NonFiniteLossError


class Agreement(Method):
    """Both global views of an image shall have the same features, and different images others."""

    method, title = "agreement", "Agreement"

    def __init__(self, backbone="vit_tiny", patch_size=8, img_size=16, in_chans=3, drop_path_rate=0.0, optimizer="adamw", lr=0.1,
                 min_lr=0.0, warmup_epochs=0, weight_decay=0.1, weight_decay_end=0.1, clip_grad=1.0, weights=None):  # fmt: skip
        given, backbone = backbone, plain(backbone)
        super().__init__(locals())
        self.network = Network(self.build_backbone(given), nn.Linear(self._width, 8))

    @property
    def trained(self):
        return self.network

    def training_step(self, batch, batch_idx):
        self.finish_step()
        first, second = self.network(split_views(batch)).chunk(2)
        return {"loss": F.cross_entropy(first @ second.T, torch.arange(len(first)))}


class Watch(Callback):
    def __init__(self, poisoned=None):
        self.poisoned, self.norms = poisoned, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.poisoned:
            batch[0].fill_(torch.nan)

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.stack(gradients).norm().item())


def fit(module, *callbacks, ckpt_path=None, max_epochs=3):
    random = torch.Generator().manual_seed(0)
    loader = DataLoader([[torch.randn(3, 16, 16, generator=random) for _ in range(2)] for _ in range(16)], 4)
    trainer = Trainer(accelerator="cpu", max_epochs=max_epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
                      callbacks=list(callbacks), enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks))  # fmt: skip
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def build():
    torch.manual_seed(0)
    return Agreement(VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2))


def test_a_method_without_a_teacher_trains_resumes_and_gives_features(tmp_path):
    watch, saving = Watch(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    module = build()
    trainer = fit(module, watch, saving, CollapseDoctor(), Throughput())
    assert len(watch.norms) > 5 and max(watch.norms) == pytest.approx(1.0, rel=1e-4), "clipped by the norm of all"
    assert {"train/lr", "train/weight_decay", "train/skipped_steps"} <= trainer.callback_metrics.keys()
    resumed = build()
    fit(resumed, ckpt_path=tmp_path / "step=4.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(module.eval()(images), module.as_backbone()(images))
    assert torch.load(tmp_path / "step=4.ckpt", weights_only=True)["method"] == "agreement"


def test_a_loss_that_is_not_finite_stops_any_method():
    with pytest.raises(NonFiniteLossError, match="not finite at step 2 .epoch 0., with learning rate"):
        fit(build(), Watch(poisoned=2))


def test_methods_are_found_by_name():
    for name, owner in METHODS.items():
        found = method_class(name)
        assert (found.__module__, found.__name__) == home(name) and found.__name__ == owner and found.method == name
    with pytest.raises(ValueError, match="no method 'dinov3'; there are dino, dinov2"):
        method_class("dinov3")


def test_features_have_a_gradient_through_recomputed_blocks():
    """The blocks are computed again in the mode that they were in."""
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.5)
    module = SimCLRModule(backbone, img_size=32, hidden_dim=16, projection_dim=8).train()
    backbone.activation_checkpointing = True
    module(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
