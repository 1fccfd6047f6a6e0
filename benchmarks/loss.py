"""Time and extra memory of the loss at K = 65,536, forward and backward: ours, pair by pair as in the paper's pseudocode, others'.

    python benchmarks/loss.py [--batch 64] [--views 10] --reference PATH --lightly
    python benchmarks/loss.py --masked 512     # iBOT's loss of so many masked patches, against its plain form

Each variant runs in fresh processes, float32, one thread, with the variants in alternating order. Extra memory is the growth of the
process's peak resident size (VmHWM) over the logits that exist before; the time is the best of three calls after the first. Linux only.
Before that, loss and gradient of ours and of the reference must agree in float64.
"""

import argparse
import functools
import subprocess
import sys

import torch
from others import import_reference, single_process_group
from pairing import compare, interleaved, parser, peak_mb, save, seconds

from dino_lightning.losses import DINOLoss, IBOTLoss

CPU = torch.device("cpu")


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


def dino(variant, batch, n_views, k, path, dtype=torch.float32):
    """The logits to differentiate, and the loss of them."""
    student, teacher = (torch.randn(n * batch, k, dtype=dtype).mul_(0.1) for n in (n_views, 2))
    student.requires_grad_()
    if variant == "ours":
        return student, functools.partial(DINOLoss(k).to(dtype), student, teacher, 0.04)
    if variant == "reference":
        single_process_group()
        loss = import_reference(path)["main_dino"].DINOLoss(k, n_views, 0.04, 0.04, 0, 100).to(dtype)
        return student, functools.partial(loss, student, teacher, 0)
    if variant == "lightly":
        from lightly.loss import DINOLoss as Theirs

        loss = Theirs(output_dim=k, warmup_teacher_temp_epochs=5)
        return student, lambda: loss(list(teacher.chunk(2)), list(student.chunk(n_views)), epoch=5)
    return student, functools.partial(pairwise, student, teacher, torch.zeros(1, k), 0.04)


def ibot(variant, masked, k):
    """The same of patches, of which 64 are masked in each crop (in the last one, the rest)."""
    student, targets = torch.randn(masked, k).mul_(0.1).requires_grad_(), torch.rand(masked, k)
    targets /= targets.sum(dim=-1, keepdim=True)
    masks = torch.arange(196) < (masked - torch.arange(0, masked, 64))[:, None].clamp(max=64)
    return student, functools.partial(IBOTLoss() if variant == "ours" else patchwise, student, targets, masks)


def measure(args, k=65536, steps=4):
    """Prints the milliseconds of a call and the extra megabytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.masked:
        student, loss_fn = ibot(args.only, args.masked, k)
    else:
        student, loss_fn = dino(args.only, args.batch, args.views, k, args.reference)
    before, times = peak_mb(CPU), []
    for _ in range(steps):
        start = seconds(CPU)
        loss_fn().backward()
        times.append(seconds(CPU) - start)
        student.grad = None
    print(min(times[1:]) * 1e3, peak_mb(CPU) - before)


def gate(args, tolerance=1e-6):
    """Ends the program if loss or gradient differ from the reference's in float64."""
    found = []
    for variant in ("ours", "reference"):
        torch.manual_seed(0)
        student, loss_fn = dino(variant, 3, args.views, 4096, args.reference, torch.float64)
        loss = loss_fn()
        loss.backward()
        found.append((loss.item(), student.grad))
    (own, own_gradient), (other, other_gradient) = found
    worst = max(abs(own / other - 1), ((own_gradient - other_gradient).norm() / other_gradient.norm()).item())
    print(f"float64: loss and gradient differ from the reference's by {worst:.1e}")
    if not worst <= tolerance:
        raise SystemExit(f"no timing: that is more than {tolerance:.0e}")
    return worst


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--views", type=int, default=10)
    arguments.add_argument("--masked", type=int, default=0, help="time iBOT's loss of so many masked patches instead")
    arguments.add_argument("--only", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.only:
        measure(args)
        sys.exit()
    names = ["ours", "plain"]
    results = {}
    if not args.masked:
        names += ["reference"] * (args.reference is not None) + ["lightly"] * args.lightly
        results = {"gate": gate(args)} if args.reference else {}

    def run(name):
        command = [sys.executable, *sys.argv, "--only", name]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-2:]

    found = interleaved({name: functools.partial(run, name) for name in names}, args.rounds)
    title = f"{args.masked} masked patches" if args.masked else f"batch {args.batch}, {args.views} views"
    for i, (what, unit) in enumerate((("time", "ms"), ("extra memory", "MB"))):
        column = {name: [float(values[i]) for values in rows] for name, rows in found.items()}
        results[what] = {"summary": compare(f"{what} of the loss, K = 65,536, {title}, float32", column, unit), "rounds": column}
    save(args.json, results)
