"""A training step of DINO: forward passes of both networks, loss, backward pass, clipping, AdamW, moving average, centre.

    python benchmarks/step.py [--arch vit_small] [--k 65536] [--batch 4] [--precision 32|bf16|fp16] --reference PATH --lightly
    python benchmarks/step.py --memory --reference PATH       # peak memory, each variant in a process of its own

Before anything is timed, loss and gradients of ours and of the reference must agree in float64, from the same weights.
One process, one device, random views of 2 × 224 and 8 × 96 pixels; on a CPU one thread.
"""

import argparse
import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from others import Step, lightly, reference
from pairing import compare, interleaved, parser, peak_mb, save, seconds
from torch import Tensor

from dino_lightning import DINOModule
from dino_lightning.training.optim import build_optimizer, clip_each_, gradient_norms, param_groups

LOCAL = 8
PRECISIONS = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def ours(arch: str, k: int, drop_path: float, device: torch.device, compiled: bool = False) -> Step:
    """The pieces of ``DINOModule`` in the order of its training step, without a Trainer."""
    module = DINOModule(arch, out_dim=k, drop_path_rate=drop_path).to(device)
    if compiled:
        module.compile()
    student, teacher, loss = module.student.train(), module.teacher, module.loss.train()
    optimizer = build_optimizer("adamw", param_groups(student, 0.04), fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def forward(views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = teacher(views[:2])
        return loss(student(views), targets, 0.04)

    def update() -> None:
        gradients, norms = gradient_norms(student.parameters())
        clip_each_(gradients, norms, 3.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.update_center()
        teacher.follow(student, 0.996)

    return Step(student, teacher, loss, forward, update)


def random_views(batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, 3, side, side, device=device, dtype=dtype) for side in [224] * 2 + [96] * LOCAL]


def whole_step(step: Step, precision: str, device: torch.device) -> Callable[[list[Tensor]], None]:
    """Forward and backward pass and update. Float16 on a GPU has a gradient scaler, as in the reference."""
    dtype = PRECISIONS[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run(views: list[Tensor]) -> None:
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            loss = step.forward(views)
        scaler.scale(loss).backward()
        if scaler.is_enabled():  # the optimizer is inside of the update: here gradients are unscaled, and that is all
            torch._foreach_mul_([p.grad for p in step.student.parameters() if p.grad is not None], 1 / scaler.get_scale())
        step.update()

    return run


def timed(run: Callable[[list[Tensor]], None], views: list[Tensor], device: torch.device) -> float:
    """Seconds of a step on these views."""
    start = seconds(device)
    run(views)
    return seconds(device) - start


def gate(arch: str, path, tolerance: float = 1e-6) -> float:
    """The largest relative difference of the loss and of any gradient between ours and the reference's, in float64.

    Raises:
        SystemExit: if it is more than the tolerance.
    """
    cpu = torch.device("cpu")
    theirs, own = reference(path, arch, 512, 0.0, 2 + LOCAL, cpu), ours(arch, 512, 0.0, cpu)
    for network, other in ((own.student, theirs.student), (own.teacher, theirs.teacher)):
        network.double().load_state_dict(other.double().state_dict())
    own.loss.double(), theirs.loss.double()
    views = random_views(2, cpu, torch.float64)
    losses = [step.forward(views) for step in (own, theirs)]
    differences = {"the loss": abs(losses[0] / losses[1] - 1).item()}
    for loss in losses:
        loss.backward()
    other = dict(theirs.student.named_parameters())
    for name, parameter in own.student.named_parameters():
        if parameter.requires_grad:
            differences[name] = ((parameter.grad - other[name].grad).norm() / other[name].grad.norm().clamp(min=1e-12)).item()
    worst = max(differences, key=differences.get)
    print(f"float64, same weights: the largest difference to the reference is {differences[worst]:.1e}, of {worst}", flush=True)
    if not differences[worst] <= tolerance:
        raise SystemExit(f"no timing: {worst} differs by {differences[worst]:.1e}, more than {tolerance:.0e}")
    return differences[worst]


def build(name: str, args: argparse.Namespace, device: torch.device) -> Step:
    if name == "reference":
        return reference(args.reference, args.arch, args.k, args.drop_path, 2 + LOCAL, device)
    if name == "lightly":
        return lightly(args.arch, args.k, args.drop_path, device)
    return ours(args.arch, args.k, args.drop_path, device, compiled=name == "ours, compiled")


def memory_of(name: str, args: argparse.Namespace) -> float:
    """Peak memory in MB of three steps in a fresh process, less what is there before the networks."""
    command = [sys.executable, *sys.argv, "--only", name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--arch", default="vit_small", choices=["vit_tiny", "vit_small", "vit_base"])
    arguments.add_argument("--k", type=int, default=65536)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--precision", default="32", choices=PRECISIONS)
    arguments.add_argument("--drop_path", type=float, default=0.1)
    arguments.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments.add_argument("--compile", action="store_true", help="time ours also with compiled backbones")
    arguments.add_argument("--memory", action="store_true", help="peak memory instead of time")
    arguments.add_argument("--only", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.device.type == "cpu":
        torch.set_num_threads(1)
    if args.only:
        before = peak_mb(args.device)
        run, views = whole_step(build(args.only, args, args.device), args.precision, args.device), random_views(args.batch, args.device)
        for _ in range(3):
            run(views)
        print(peak_mb(args.device) - before)
        sys.exit()
    names = ["ours"] + ["ours, compiled"] * args.compile + ["reference"] * (args.reference is not None) + ["lightly"] * args.lightly
    results = {"gate": gate(args.arch, args.reference)} if args.reference else {}
    title = f"{args.arch}, K = {args.k:,}, batch {args.batch}, precision {args.precision}, {args.device.type}"
    if args.memory:
        found = interleaved({name: lambda name=name: memory_of(name, args) for name in names}, args.rounds)
        results["summary"] = compare(f"peak memory of a training step, {title}", found, "MB")
    else:
        views = random_views(args.batch, args.device)
        steps = {name: whole_step(build(name, args, args.device), args.precision, args.device) for name in names}
        for run in steps.values():
            for _ in range(3 if args.device.type == "cuda" else 1):
                run(views)
        found = interleaved({name: functools.partial(timed, run, views, args.device) for name, run in steps.items()}, args.rounds)
        results["summary"] = compare(f"a training step, {title}", found, "s")
    save(args.json, {**results, "rounds": found})
