"""What training costs, on paper: each formula against what the real networks do."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning import DINOHead, VisionTransformer
from dino_lightning.backbones.block import drop_path_subset
from dino_lightning.cli import main
from dino_lightning.evaluation.gpus import DEVICES, device_called
from dino_lightning.evaluation.estimate import Head, ViT, network_seconds, ring_bytes
from dino_lightning.evaluation.kept import kept_bytes
from dino_lightning.methods import method_class
from dino_lightning.tools.costs import run_of
from dino_lightning.tools.estimate import estimated

VITS = {
    "tiny": {"embed_dim": 192, "num_heads": 3, "depth": 3},
    "small, patch 8": {"embed_dim": 384, "num_heads": 6, "depth": 2, "patch_size": 8},
    "dinov2": {
        "embed_dim": 192, "num_heads": 3, "depth": 3, "ffn": "swiglu", "registers": 4, "layer_scale": 0.1, "mask_token": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(("size", "all_tokens", "half"), list(itertools.product(VITS, (False, True), (False, True))))
def test_what_autograd_keeps_of_a_vit_and_its_operations(size, all_tokens, half):
    torch.manual_seed(0)
    network = VisionTransformer(**VITS[size])
    images, vit = torch.rand(2, 3, 112, 96), ViT.of(network)
    tokens = vit.tokens(112, 96)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network.forward_features(images)[0].patches if all_tokens else network(images)

    weights = 2 * sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d))
    kept = kept_bytes(network, call)
    # Under autocast also the weights in half precision, and on a CPU, where our attention is not fused then, the scores.
    assert kept - half * weights == pytest.approx(2 * vit.activations(tokens, 4 - 2 * half, all_tokens, fused=not half), rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == pytest.approx(2 * vit.flops(tokens, all_tokens), rel=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_what_dinov2s_drop_path_saves(half):
    """It computes a branch for a subset of the samples only."""
    torch.manual_seed(0)
    network = VisionTransformer(**VITS["dinov2"], drop_path_rate=0.4, drop_path_uniform=True).train()
    images, vit = torch.rand(10, 3, 64, 64), ViT.of(network)
    share = drop_path_subset(10, 0.4)[0] / 10

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(images)

    weights = 2 * sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d))
    kept = kept_bytes(network, call)
    expected = 10 * vit.activations(vit.tokens(64, 64), 4 - 2 * half, kept=share, fused=not half)
    assert kept - half * weights == pytest.approx(expected, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == pytest.approx(10 * vit.flops(vit.tokens(64, 64), kept=share), rel=1e-6)


@pytest.mark.parametrize(("half", "layers"), [(False, 3), (True, 3), (False, 1)])
def test_what_autograd_keeps_of_a_head_and_its_operations(half, layers):
    network = DINOHead(192, 2048, nlayers=layers, hidden_dim=512, bottleneck_dim=64)
    head, features = Head.of(network), torch.rand(64, 192, requires_grad=True)
    weights = 2 * sum(layer.weight.numel() for layer in network.mlp.modules() if isinstance(layer, torch.nn.Linear))

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(features)

    kept = kept_bytes(network, call)
    assert call().dtype == torch.float32
    logits_and_norms = 4 * (64 + 1) * 2048
    assert kept - half * weights - logits_and_norms == pytest.approx(64 * head.activations(4 - 2 * half), rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == 64 * head.flops()


VIEWS = ["--data.global_crops_size", "64", "--data.local_crops_size", "32", "--data.local_crops_number", "4", "--model.img_size", "64"]
NETWORKS = {
    "dino": (["--model.backbone", "vit_tiny", "--model.out_dim", "512"], {"drop_path_rate": 0.0}),
    "dinov2": (
        ["--method", "dinov2", "--model.backbone", "vit_tiny", "--model.out_dim", "512", "--model.drop_path_rate", "0",
         "--model.ibot_separate_head", "true", "--model.ibot_out_dim", "256"],
        {"drop_path_rate": 0.0, "ibot_separate_head": True, "ibot_out_dim": 256},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", NETWORKS)
def test_a_step_of_the_real_networks(method):
    """Forward and backward of the student and forward of the teacher, counted; attention by plain products, whose backward pass is
    twice the forward pass (the fused one computes the scores again, which no MFU counts)."""
    options, given = NETWORKS[method]
    run = run_of([*options, *VIEWS, "--data.batch_size", "4"])
    module = method_class(method)("vit_tiny", img_size=64, out_dim=512, **given)
    views = [torch.rand(4, 3, 64, 64)] * 2 + [torch.rand(4, 3, 32, 32)] * 4
    rows = None
    if method == "dinov2":
        rows = torch.arange(4 * round(2 * 16 * 0.5 * 0.3))  # as many patches as are masked on average
        from dino_lightning.methods.dinov2 import _look
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if method == "dino":
            with torch.no_grad():
                module.teacher(views[:2])
            module.student(views).sum().backward()
        else:
            with torch.no_grad():
                _look(module.teacher, views[:2], rows)
            look = _look(module.student, views, rows)
            (look.logits.sum() + look.patch_logits.sum()).backward()
    assert counter.get_total_flops() == pytest.approx(4 * run.step.flops, rel=0.01)
    assert run.step.flops == pytest.approx(module.flops_per_image([view[:1] for view in views]), rel=0.005)  # what train/mfu counts
    parameters = sum(p.numel() for p in module.student.parameters())
    assert run.step.parameters == run.step.teacher == parameters
    assert run.step.gradient_bytes == 4 * sum(p.numel() for p in module.student.parameters() if p.requires_grad)


# A training step in a process of its own, twice: by how many bytes it grew at most. Linux only.
GROWTH = """
import sys
import torch
from dino_lightning import DINOHead, DINOLoss
from dino_lightning.backbones import build
from dino_lightning.methods.networks import Network, Teacher
from dino_lightning.training.optim import build_optimizer, param_groups

def peak():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

name, batch, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
(torch.rand(64, 64, requires_grad=True) @ torch.rand(64, 64)).sum().backward()  # what the first product of a process loads
before = peak()
student = Network(build(name), DINOHead(build(name).embed_dim, k))
teacher = Teacher(student)
loss = DINOLoss(k)
optimizer = build_optimizer("adamw", param_groups(student, 0.04), fused=True)
for _ in range(2):
    views = [torch.rand(batch, 3, 224, 224)] * 2 + [torch.rand(batch, 3, 96, 96)] * 4
    with torch.no_grad():
        targets = teacher(views[:2])
    loss(student(views), targets, 0.04).backward()
    optimizer.step()
    optimizer.zero_grad()
    teacher.follow(student, 0.99)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "batch", "k"), [("vit_tiny", 16, 4096), ("vit_small", 8, 4096), ("vit_tiny", 8, 65536)])
def test_a_process_grows_as_estimated(name, batch, k):
    options = ["--model.backbone", name, "--model.out_dim", str(k), "--data.batch_size", str(batch), "--data.local_crops_number", "4"]
    expected = run_of(options).step.memory().total
    command = [sys.executable, "-c", GROWTH, name, str(batch), str(k)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)
    print(f"{name}, {batch} images, K = {k}: {grown / 2**20:.0f} MiB measured, {expected / 2**20:.0f} estimated ({expected / grown:.2f})")
    assert expected == pytest.approx(grown, rel=0.15)
