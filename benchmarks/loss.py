"""Time and extra memory of the loss at K = 65,536 against the pair-by-pair form of the paper's pseudocode.

    python benchmarks/loss.py [--batch 64] [--views 10] [--rounds 3]

Each variant runs in a fresh process, forward and backward, float32, one thread. Extra memory is the growth of the
process's peak resident size (VmHWM) over the logits that exist before. Linux only.
"""

import argparse
import subprocess
import sys
import time

import torch

from dino_lightning import DINOLoss

VARIANTS = ("pairwise", "ours")


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


def peak_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def measure(variant, batch, n_views, k=65536, steps=4):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = torch.randn(n_views * batch, k).mul_(0.1).requires_grad_()
    teacher = torch.randn(2 * batch, k).mul_(0.1)
    ours, center = DINOLoss(k).eval(), torch.zeros(1, k)
    before, times = peak_mb(), []
    for _ in range(steps):
        start = time.perf_counter()
        loss = ours(student, teacher, 0.04) if variant == "ours" else pairwise(student, teacher, center, 0.04)
        loss.backward()
        times.append(time.perf_counter() - start)
        student.grad = None
    print(f"{variant:10}{times[0] * 1e3:10.0f}{min(times[1:]) * 1e3:12.0f}{peak_mb() - before:14.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one in this process")
    args = parser.parse_args()
    if args.variant:
        measure(args.variant, args.batch, args.views)
    else:
        print(f"{'variant':10}{'first ms':>10}{'steady ms':>12}{'extra MB':>14}", flush=True)
        for i in range(args.rounds):
            for variant in VARIANTS if i % 2 == 0 else reversed(VARIANTS):
                subprocess.run([sys.executable, *sys.argv, "--variant", variant], check=True)
