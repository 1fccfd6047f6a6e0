"""Time and extra memory of the loss at K = 65,536 against the plain form: pair by pair, as in the paper's pseudocode.

    python benchmarks/loss.py [--batch 64] [--views 10] [--rounds 3]
    python benchmarks/loss.py --masked 512     # iBOT's loss of so many masked patches, against its plain form

Each variant runs in a fresh process, forward and backward, float32, one thread. Extra memory is the growth of the
process's peak resident size (VmHWM) over the logits that exist before. Linux only.
"""

import argparse
import functools
import subprocess
import sys
import time

import torch

from dino_lightning.losses import DINOLoss, IBOTLoss

VARIANTS = ("plain", "ours")


def pairwise(student, teacher, center, temp):
    n_views = 2 * len(student) // len(teacher)
    views = (student / 0.1).chunk(n_views)
    targets = torch.softmax((teacher - center) / temp, dim=-1).detach().chunk(2)
    terms = [
        torch.sum(-target * torch.log_softmax(view, dim=-1), dim=-1).mean()
        for i, target in enumerate(targets)
        for v, view in enumerate(views)
        if v != i
    ]
    return sum(terms) / len(terms)


def patchwise(student, targets, masks):
    weights = (masks / masks.sum(dim=1, keepdim=True).clamp(min=1))[masks]
    return (torch.sum(-targets * torch.log_softmax(student / 0.1, dim=-1), dim=-1) * weights).sum() / len(masks)


def peak_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def dino(variant, batch, n_views, k):
    """The logits to differentiate, and the loss of them."""
    student, teacher = torch.randn(n_views * batch, k).mul_(0.1).requires_grad_(), torch.randn(2 * batch, k).mul_(0.1)
    if variant == "ours":
        return student, functools.partial(DINOLoss(k).eval(), student, teacher, 0.04)
    return student, functools.partial(pairwise, student, teacher, torch.zeros(1, k), 0.04)


def ibot(variant, masked, k):
    """The same of patches, of which 64 are masked in each crop (in the last one, the rest)."""
    student, targets = torch.randn(masked, k).mul_(0.1).requires_grad_(), torch.rand(masked, k)
    targets /= targets.sum(dim=-1, keepdim=True)
    masks = torch.arange(196) < (masked - torch.arange(0, masked, 64))[:, None].clamp(max=64)
    return student, functools.partial(IBOTLoss() if variant == "ours" else patchwise, student, targets, masks)


def measure(variant, batch, n_views, masked, k=65536, steps=4):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, loss_fn = ibot(variant, masked, k) if masked else dino(variant, batch, n_views, k)
    before, times = peak_mb(), []
    for _ in range(steps):
        start = time.perf_counter()
        loss_fn().backward()
        times.append(time.perf_counter() - start)
        student.grad = None
    print(f"{variant:10}{times[0] * 1e3:10.0f}{min(times[1:]) * 1e3:12.0f}{peak_mb() - before:14.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--masked", type=int, default=0, help="time iBOT's loss of so many masked patches instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one in this process")
    args = parser.parse_args()
    if args.variant:
        measure(args.variant, args.batch, args.views, args.masked)
    else:
        print(f"{'variant':10}{'first ms':>10}{'steady ms':>12}{'extra MB':>14}", flush=True)
        for i in range(args.rounds):
            for variant in VARIANTS if i % 2 == 0 else reversed(VARIANTS):
                subprocess.run([sys.executable, *sys.argv, "--variant", variant], check=True)
