"""What training costs, on paper: each formula against what the real networks do."""

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning import DINOHead, DINOLoss, VisionTransformer
from dino_lightning.backbones import build
from dino_lightning.backbones.block import drop_path_subset
from dino_lightning.cli import main
from dino_lightning.evaluation.estimate import Head, ViT, optimizer_bytes, ring_bytes
from dino_lightning.evaluation.gpus import DEVICES, device_called
from dino_lightning.evaluation.kept import kept_bytes
from dino_lightning.methods import method_class
from dino_lightning.methods.dinov2 import _look
from dino_lightning.tools.costs import run_of
from dino_lightning.tools.estimate import ROOM, estimate

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
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):  # the fused one is not counted by all torches
        call()
    assert counter.get_total_flops() == pytest.approx(2 * vit.flops(tokens, all_tokens), rel=1e-6)


def test_what_autograd_keeps_of_blocks_that_are_computed_anew():
    """Their inputs, and while one is, what that one needs."""
    network = VisionTransformer(**VITS["small, patch 8"], activation_checkpointing=True)
    images, vit = torch.rand(2, 3, 112, 96), ViT.of(network)
    tokens, whole = vit.tokens(112, 96), ViT.of(VisionTransformer(**VITS["small, patch 8"]))
    one = whole._replace(depth=3).activations(tokens, 4) - whole.activations(tokens, 4)
    assert kept_bytes(network, lambda: network(images)) + 2 * one == pytest.approx(2 * vit.activations(tokens, 4), rel=0.01)
    assert vit._replace(depth=24).activations(tokens, 4) < 0.15 * whole._replace(depth=24).activations(tokens, 4)


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
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):  # the fused one is not counted by all torches
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
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):  # the fused one is not counted by all torches
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


@pytest.mark.parametrize("half", [False, True])
def test_what_autograd_keeps_of_a_step(half):
    """All but what the backward pass adds: DINO's student, logits and loss. The batch is not kept by autograd under autocast."""
    k = 65536
    precision = ["--trainer.precision", "bf16-mixed"] if half else []
    step = run_of(["--model.backbone", "vit_tiny", "--model.out_dim", str(k), *VIEWS, "--data.batch_size", "4", *precision]).step
    module = method_class("dino")("vit_tiny", img_size=64, out_dim=k, drop_path_rate=0.0)
    views, teacher_logits = [torch.rand(4, 3, 64, 64)] * 2 + [torch.rand(4, 3, 32, 32)] * 4, torch.rand(8, k)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return DINOLoss(k)(module.student(views), teacher_logits, 0.04)

    memory = step.memory()
    scores = sum(count * 4 * 11 * 3 * tokens * (2 * tokens - 4) for count, tokens in ((2, 17), (4, 5)))  # not fused on a CPU in bfloat16
    gradient, teacher, norms = 4 * 6 * 4 * k, 4 * 2 * 4 * k, 4 * k  # autograd keeps neither of the first two, and the prototypes' norms
    expected = memory.activations + memory.half_weights + memory.logits + memory.loss - gradient - teacher + norms + half * scores
    assert kept_bytes(module.student, call) == pytest.approx(expected, rel=0.02)


def test_shards_divide_what_is_kept_and_multiply_what_is_sent():
    options = [
        "--model.backbone",
        "vit_tiny",
        "--model.out_dim",
        "512",
        *VIEWS,
        "--data.batch_size",
        "4",
        "--trainer.accumulate_grad_batches",
        "2",
    ]
    whole, shards = (run_of([*options, "--trainer.strategy", name], devices=4).step for name in ("ddp", "sharded"))
    for name in ("parameters", "teacher", "gradients", "optimizer"):
        assert getattr(shards.memory(), name) == getattr(whole.memory(), name) // 4
    assert shards.memory().activations == whole.memory().activations
    # Of two micro-batches: the student forward and backward for two sizes of crops, its gradients, the teacher; the centre as before.
    passes = 2 * (2 * (2 * whole.parameters + whole.trainable) + whole.teacher)
    assert shards.sent_bytes() == pytest.approx(3 / 4 * 4 * passes + ring_bytes(whole.centre_bytes, 4))


def test_a_cnn_is_counted_without_being_run():
    network, images = build("resnet18"), torch.rand(2, 3, 64, 64)
    kept = kept_bytes(network, lambda: network(images))
    options = ["--model.backbone", "resnet18", "--model.out_dim", "64", "--data.global_crops_size", "64", "--data.local_crops_number", "0"]
    run = run_of(options)
    head = Head((512, 2048, 2048, 256), 64)
    assert run.counted and run.step.activation_bytes == pytest.approx(kept + 2 * head.activations(4), rel=0.01)
    module = method_class("dino")("resnet18", out_dim=64)
    assert run.step.flops == module.flops_per_image([torch.rand(1, 3, 64, 64)] * 2)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("cifar10", "VisionTransformer/4, crops 2 × 32×32, 8 × 16×16, K = 4096, bfloat16"),
        ("quickstart", "16,384 images in all epochs"),  # its generated scenes, eight times
        ("resnet50", "a rough guess"),
        ("dinov2_warm_start", "DINOv2, dinov2_vits14/14, crops 2 × 224×224, 8 × 98×98, K = 4096, 4096"),
    ],
)
def test_recipes_are_estimated(recipe, said, capsys):
    main(["estimate", "--config", recipe])
    assert said in capsys.readouterr().out


def test_what_the_command_says(capsys, tmp_path):
    args = ["--config", "vit_base", "--data.batch_size", "512", "--trainer.accumulate_grad_batches", "2"]
    found = estimate(*args, gpu="rtx4090", devices=4, images=1000, mfu=0.5)
    step, out = found.run.step, capsys.readouterr().out
    assert f"DOES NOT FIT: 512 images a device; the largest number that does is {found.largest_batch} " in out
    room = ROOM * 24 * 2**30
    assert step._replace(batch=found.largest_batch).memory().total <= room < step._replace(batch=found.largest_batch + 1).memory().total
    assert step.images == 4096 and found.seconds["compute"] == pytest.approx(1024 * step.flops / (0.5 * 165.2e12))
    assert found.images_per_s == pytest.approx(4096 / found.seconds["compute"]) and found.bound == "compute"
    assert found.hours == pytest.approx(300 * 1000 / found.images_per_s / 3600)
    assert found.workers == -(-found.images_per_s / 4 * 4.4 // 1000)
    assert found.seconds["network"] == pytest.approx(1.5 * (4 * step.trainable + 4 * 65538) / 32e9)  # PCIe: 256 Gb/s
    assert step.memory().optimizer == optimizer_bytes(step.trainable, "adamw") == 2 * optimizer_bytes(step.trainable, "lars")
    # As many devices more as the network lets: there, and no further.
    small = ["--config", "vit_small", "--data.batch_size", "8", "--trainer.devices", "64"]
    far = estimate(*small, link_gbps=400.0)
    assert far.bound == "network" and far.most_devices < 64
    last = estimate(*small[:3], str(512 // far.most_devices), devices=far.most_devices, link_gbps=400.0)
    assert last.seconds["network"] < 1.1 * last.seconds["compute"]
    assert estimate(*small, "--data.num_workers", "1", worker_ms=100.0).bound == "data"


def test_wrong_assumptions_are_refused():
    for arguments, message in (
        ({"gpu": "h1000"}, "unknown gpu 'h1000'; there are v100-16, v100-32, t4,"),
        ({"mfu": 35.0}, "mfu is a share of the peak, at most 1, got 35.0"),
        ({"worker_ms": 0.0}, "worker_ms must be positive, got 0.0"),
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"gpu": "t4"}, "T4 has no known speed in bfloat16; estimate with --trainer.precision 16-mixed"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate("--config", "vit_tiny", **arguments)
    with pytest.raises(ValueError, match="patch size 16 does not divide the image size 90×90"):
        estimate("--data.local_crops_size", "90")


def test_ring():
    assert [ring_bytes(100, n) for n in (1, 2, 4)] == [0, 100, 150]


CALLED = {
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4", "NVIDIA A10": "a10", "Tesla T4": "t4", "Tesla V100-SXM2-32GB": "v100-32", "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80", "NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA RTX A6000": "a6000",
    "NVIDIA GeForce RTX 3090": "rtx3090", "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA GeForce RTX 5090": "rtx5090",
}  # fmt: skip
RELATIVES = (
    "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L40", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA RTX 6000 Ada Generation", "Tesla V100-PCIE-16GB",
)  # fmt: skip


def test_gpus_are_known_by_their_names():
    for name, key in CALLED.items():
        assert device_called(name) is DEVICES[key], name
    assert {*CALLED.values(), "v100-16"} == set(DEVICES)
    assert [name for name in RELATIVES if device_called(name)] == []
    for gpu in DEVICES.values():
        assert gpu.has_bfloat16 == (gpu.peak(torch.bfloat16) is not None) and gpu.peak(torch.float16) == gpu.half * 1e12
        assert gpu.source.startswith("NVIDIA data sheet, ")
        assert gpu.peak(torch.float32) is None or gpu.peak(torch.float32) <= gpu.peak(torch.float32, tf32=True) < gpu.half * 1e12


SCALING = Path(__file__).parents[1] / "benchmarks" / "scaling.py"
MEMORY = SCALING.parents[1] / "docs" / "how-to" / "devices.md"


def test_the_page_is_what_the_formulas_say():
    """Of the page a network, and of the documentation's table a recipe; all of both in the slow test."""
    scaling, page = runpy.run_path(str(SCALING)), SCALING.with_suffix(".md").read_text()
    assert all(row in page for row in scaling["rows_of"]("DINO ViT-S/16"))
    assert scaling["sent"](["DINO vit_small"]).splitlines()[-1] in page
    assert all(row in MEMORY.read_text() for row in scaling["memory_table"](["vit_small"]))


@pytest.mark.slow
def test_the_whole_page_is_what_the_formulas_say():
    scaling = runpy.run_path(str(SCALING))
    assert scaling["page"]() == SCALING.with_suffix(".md").read_text()
    assert "\n".join(scaling["memory_table"]()) in MEMORY.read_text()


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
    unpooled = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives freed memory back at once: its waste is not estimated
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=unpooled).stdout)
    print(f"{name}, {batch} images, K = {k}: {grown / 2**20:.0f} MiB measured, {expected / 2**20:.0f} estimated ({expected / grown:.2f})")
    assert expected == pytest.approx(grown, rel=0.15)
