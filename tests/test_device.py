"""What a training step asks of a GPU, found out without one.

The real Trainer runs on torch's meta device, which has no data: whatever would wait for a device (``item``, ``nonzero``, a boolean
index, a copy to the host) or mix tensors of two devices fails there, and each operation that would be a kernel is counted.
"""

from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import CollapseDoctor, Throughput, doctor
from dino_lightning.methods.dinov2 import DINOv2Module
from dino_lightning.training.late import LateReading

META = torch.device("meta")
# They move no data: they look at what is there in another way.
VIEWS = {"view", "t", "transpose", "unsqueeze", "squeeze", "slice", "split", "split_with_sizes", "expand", "_unsafe_view", "detach", "select",
         "permute", "as_strided", "alias", "unbind", "_reshape_alias", "new_empty", "empty", "empty_like", "new_empty_strided"}  # fmt: skip


class MetaAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class MetaStrategy(SingleDeviceStrategy):
    """Training on the meta device; what Lightning reads before the first step and after the last one is spared."""

    def __init__(self):
        super().__init__(META, accelerator=MetaAccelerator())

    def reduce(self, tensor, *args, **kwargs):
        return torch.tensor(1)  # that there are batches

    def teardown(self):
        self.lightning_module.trainer.fit_loop.epoch_loop._results.clear()
        self.lightning_module.trainer._logger_connector.teardown = lambda: None


class Kernels(TorchDispatchMode):
    """Counts the operations on the meta device by the phase of the step."""

    def __init__(self):
        super().__init__()
        self.phase, self.counts = "", {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS and any(isinstance(leaf, torch.Tensor) and leaf.device == META for leaf in tree_leaves((args, kwargs, result))):
            self.counts.setdefault(self.phase, Counter())[name] += 1
        return result


class Phases(Callback):
    """Counts during the last batch, from its painting on."""

    def __init__(self, kernels):
        self.kernels = kernels

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.kernels.phase = "forward"

    def on_before_backward(self, trainer, module, loss):
        self.kernels.phase = "backward"

    def on_after_backward(self, trainer, module):
        self.kernels.phase = "update"

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 2 == trainer.num_training_batches:
            self.kernels.phase = "painting"
            self.kernels.__enter__()

    def on_train_epoch_end(self, trainer, module):
        self.kernels.__exit__(None, None, None)


def train_on_meta(module_class, monkeypatch, **options):
    """The kernels of the last of a few steps, by phase, with the callbacks of the command line."""
    seed_everything(0)
    monkeypatch.setattr(LateReading, "read", lambda reading: torch.zeros(reading._value.shape).tolist())  # meant to be read, late
    monkeypatch.setattr(doctor, "_WINDOW", 2)
    images = [torch.randint(0, 255, (3, 48, 48), dtype=torch.uint8) for _ in range(12)]
    data = MultiCropDataModule(dataset=images, batch_size=2, num_workers=0, global_crops_size=32, local_crops_size=16)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, drop_path_rate=0.1,
                            mask_token=module_class is DINOv2Module)  # fmt: skip
    module = module_class(vit, out_dim=64, hidden_dim=16, bottleneck_dim=8, **options)
    kernels = Kernels()
    trainer = Trainer(strategy=MetaStrategy(), max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[Phases(kernels), Throughput(), CollapseDoctor()])  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 6, "three windows of the doctor"
    return kernels.counts


@pytest.mark.parametrize("method", [DINOModule, DINOv2Module])
def test_a_step_neither_waits_for_the_device_nor_launches_many_kernels(method, monkeypatch):
    counts = {phase: sum(found.values()) for phase, found in train_on_meta(method, monkeypatch).items()}
    # On the meta device attention is not fused, and clipping, AdamW and EMA are not one operation for all parameters.
    assert counts["painting"] < 650 and counts["forward"] < 1000 and counts["backward"] < 1000, counts
    assert counts["update"] < 1250, counts


class Waits(DINOModule):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        outputs["loss"].item()
        return outputs


def test_a_step_that_waits_is_found(monkeypatch):
    with pytest.raises(RuntimeError, match="meta"):
        train_on_meta(Waits, monkeypatch)
