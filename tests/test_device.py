"""What a training step asks of a GPU, found out without one.

The real Trainer runs on torch's meta device, which has no data: whatever would wait for a device (``item``, ``nonzero``, a boolean
index, a copy to the host) or mix tensors of two devices fails there, and each operation that would be a kernel is counted.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from dino_lightning import DINOHead, DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.callbacks import CollapseDoctor, Throughput, doctor
from dino_lightning.methods.dinov2 import DINOv2Module
from dino_lightning.methods.networks import Network
from dino_lightning.training.checks import warn_of_slow_precision
from dino_lightning.training.devices import settle
from dino_lightning.training.late import LateReading

META = torch.device("meta")
# They move no data: they look at what is there in another way.
VIEWS = {"view", "t", "transpose", "unsqueeze", "squeeze", "slice", "split", "split_with_sizes", "expand", "_unsafe_view", "detach", "select",
         "permute", "as_strided", "alias", "unbind", "_reshape_alias", "new_empty", "empty", "empty_like", "new_empty_strided",
         "device"}  # fmt: skip


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
    """Counts the operations on a device by the phase of the step."""

    def __init__(self, device=META):
        super().__init__()
        self.device = device
        self.phase, self.counts = "", {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if name not in VIEWS and any(tensor.device == self.device for tensor in tensors):
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


def test_casts_and_attention_under_autocast_on_a_gpu(monkeypatch):
    """A forward pass of both networks on fake CUDA tensors, which have no data either, in bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # reads what it draws
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: asked.append((q, k, v)) or torch.empty_like(q))
    kernels = Kernels(torch.device("cuda", 0))
    with FakeTensorMode(), torch.device("cuda"):
        networks = [Network(VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=12, num_heads=1, drop_path_rate=0.1),
                            DINOHead(64, 100, hidden_dim=16, bottleneck_dim=8)) for _ in range(2)]  # fmt: skip
        student, teacher = networks[0], networks[1].requires_grad_(False)
        views = [torch.empty(2, 3, side, side) for side in [32] * 2 + [16] * 8]
        with torch.autocast("cuda", torch.bfloat16), kernels:
            logits = [teacher(views[:2]), student(views)]
    assert {logit.dtype for logit in logits} == {torch.float32}, "products of half precision, results of full"
    count = kernels.counts[""]
    assert count["mm"] == 2 and count["addmm"] == 3 * 12 * 4 + 2 * 3
    # Of the teacher's weights and biases; of the student's, which both resolutions share; of what a norm gives to a linear layer.
    assert count["_to_copy"] < 2 * 104 + 3 * 28 and sum(count.values()) < 1000, count
    assert len(asked) == 36
    for q, k, v in asked:  # what flash attention takes
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and {x.stride(-1) for x in (q, k, v)} == {1}
        assert q.shape[-1] == 64 and q.shape[2] in (1, k.shape[2])


def small_module(module_class=DINOModule, **options):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
    return module_class(vit, out_dim=64, hidden_dim=16, bottleneck_dim=8, warmup_epochs=0, **options)


def fit(module, **options):
    torch.manual_seed(0)
    batches = [[torch.rand(3, 32, 32)] * 2 + [torch.rand(3, 16, 16)] * 2 for _ in range(8)]
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, **options)  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=2))
    return trainer


def test_compiled_in_place():
    """Each network once for each size of views, without a break and without another compilation later; nothing is renamed."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled, plain = small_module(), small_module()
    compiled.compile(backend=counter, fullgraph=True)
    for module in (compiled, plain):
        fit(module, callbacks=[Throughput()])
    assert counter.frame_count == 3, "the teacher at one size, the student at two"
    compiled(torch.rand(5, 3, 32, 32))
    assert counter.frame_count == 3, "evaluation, whose batches vary, is not compiled"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    whole = torch.compile(plain.student, backend=counter, fullgraph=True)
    whole([torch.rand(2, 3, side, side) for side in (32, 32, 16)]).sum().backward()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(plain.eval(), backend=counter)(images), plain(images), rtol=1e-4, atol=1e-5)


def test_the_option_compiles_and_a_compiled_module_is_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: asked.append((type(module).__name__, options)))
    fit(small_module(compile=True))
    assert asked == [("_Blocks", {"dynamic": False})] * 2
    with pytest.raises(ValueError, match=r"torch.compile\(module\) would compile the training step anew at every step.*compile=True"):
        fit(torch.compile(small_module(), backend="eager"))


class Logs(DINOModule):
    def report(self, numbers):
        self.log_dict({f"train/{name}": value for name, value in numbers.items()})


class Recorder(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_reported_numbers_are_those_of_lightnings_log(monkeypatch):
    """At every micro-batch, with a short way around what Lightning does for each number each time."""
    monkeypatch.setattr(doctor, "_WINDOW", 2)
    recorders, calls = [], []
    log = LightningModule.log
    monkeypatch.setattr(
        LightningModule, "log", lambda module, *args, **options: calls.append(type(module)) or log(module, *args, **options)
    )
    for module in (small_module(), small_module(Logs)):
        recorders.append(Recorder())
        fit(module, callbacks=[CollapseDoctor(), recorders[-1]], accumulate_grad_batches=2)
    ours, theirs = (recorder.rows for recorder in recorders)
    assert len(ours) == 8 and {"train/loss", "train/lr", "train/grad_norm", "train/prototypes_used"} <= ours[-1].keys()
    assert [{name: str(value) for name, value in row.items()} for row in ours] == [
        {name: str(value) for name, value in row.items()} for row in theirs
    ]
    assert 0 < calls.count(DINOModule) < calls.count(Logs) / 3


class Old:
    root_device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, precision, warned", [((7, 5), "bf16-mixed", True), ((8, 0), "bf16-mixed", False), ((7, 5), "16-mixed", False)]
)
def test_bfloat16_on_a_gpu_without_it(capability, precision, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    warn_of_slow_precision(SimpleNamespace(strategy=Old, precision=precision))
    assert ("Tesla T4 has no units for bfloat16 (compute capability 7.5" in caplog.text) == warned


def test_ddp_sends_no_buffers_without_statistics():
    vit, cnn = small_module(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for network, told, expected in ((vit, {}, False), (cnn, {}, True), (vit, {"broadcast_buffers": True}, True)):
        strategy = DDPStrategy(parallel_devices=[torch.device("cpu")], **told)
        settle(strategy, [network])
        assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "broadcast_buffers": expected}
