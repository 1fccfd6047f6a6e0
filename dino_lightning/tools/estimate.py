"""``dino-lightning estimate``: what a run will cost, before it is run."""

from typing import NamedTuple

import torch

from dino_lightning.evaluation.estimate import Memory, Step, compute_seconds, data_seconds, network_seconds, workers_needed
from dino_lightning.evaluation.gpus import Device, device
from dino_lightning.tools.costs import Run, run_of

ROOM = 0.9  # share of a GPU's memory that tensors may take; the rest is for workspaces, CUDA itself and what an allocator wastes
MACHINE = 8  # GPUs that are linked to each other
INFINIBAND = 400.0  # Gb/s of each GPU to other machines
_GIB, _MANY = 2**30, 10**6


class Estimate(NamedTuple):
    """Of a run on GPUs of a kind.

    Attributes:
        memory: bytes on a device.
        largest_batch: images on a device that fit into ``ROOM`` of its memory.
        seconds: of a step, by what may bound it: ``compute``, ``memory``, ``network`` of several devices, and ``data`` where the workers
            are said.
        images_per_s: over all devices, with the slowest of these, the others hidden behind it.
        hours: of the run; None where nothing says how many images there are.
        workers: worker processes of a device that keep up with the rest.
        most_devices: beyond which the network would bound the same images a step, over ``INFINIBAND`` or the link that was said.
    """

    run: Run
    device: Device
    memory: Memory
    largest_batch: int
    seconds: dict[str, float]
    images_per_s: float
    hours: float | None
    workers: int
    most_devices: int

    @property
    def bound(self) -> str:
        """What a step waits for, a key of ``seconds``."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def fits(self) -> bool:
        """Whether the batch that was asked for is no larger than the largest one."""
        return self.run.step.batch <= self.largest_batch


def estimate(
    *fit_options: str,
    gpu: str = "h100",
    devices: int | None = None,
    images: int | None = None,
    mfu: float = 0.35,
    worker_ms: float = 4.4,
    link_gbps: float | None = None,
) -> Estimate:
    """Says what a run will cost before it is run: memory, images a second, hours, workers, and what bounds it.

    Takes the options of fit beside its own, recipes too: dino-lightning estimate --config vit_small --devices 8 --gpu a100-80.
    Everything is computed from the sizes of the networks and the data sheet of the GPU; nothing is trained or measured.

    Args:
        fit_options: as for fit; data.root need not be there, and what plays no part is passed over.
        gpu: kind of the GPUs, e.g. h100, a100-80, rtx4090; another one is answered with all there are.
        devices: GPUs in all; by default those of the options, or one.
        images: of an epoch; by default those of data.root or data.dataset, if the options have one.
        mfu: share of the GPU's peak that the operations reach: an assumption. A run logs its own as train/mfu (which counts the branches
            that DINOv2's stochastic depth leaves out, too).
        worker_ms: milliseconds that a worker takes for the views of an image: 4.4 is what was measured of a photograph of
            400×533 on one core.
        link_gbps: 10⁹ bits a second that a GPU sends to the next one; by default NVLink or PCIe within 8 GPUs, 400 beyond them (InfiniBand).

    Returns:
        The numbers that it prints.
    """
    for name, value in {"mfu": mfu, "worker_ms": worker_ms, "link_gbps": link_gbps}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value}")
    if mfu > 1:
        raise ValueError(f"mfu is a share of the peak, at most 1, got {mfu}")
    kind = device(gpu)
    found = estimated(run_of(fit_options, devices, images), kind, mfu, worker_ms, link_gbps)
    print(_report(found, mfu, worker_ms, link_gbps or default_link(kind, found.run.step.devices)))
    return found


def estimated(run: Run, kind: Device, mfu: float, worker_ms: float, link_gbps: float | None = None) -> Estimate:
    """The numbers of a run on GPUs of a kind; the assumptions as for ``estimate``.

    Raises:
        ValueError: if the GPU has no peak for the run's precision.
    """
    step = run.step
    peak = kind.peak(run.dtype)
    if peak is None:
        other = "16-mixed" if run.dtype == torch.bfloat16 else "bf16-mixed"
        raise ValueError(f"the {kind.title} has no known speed in {_name(run.dtype)}; estimate with --trainer.precision {other}")
    seconds = {
        "compute": compute_seconds(step, peak, mfu),
        "memory": step.moved_bytes() / (kind.bandwidth * 1e9),
    }
    if step.devices > 1:
        seconds["network"] = network_seconds(step, link_gbps or default_link(kind, step.devices))
    rate = step.batch * step.accumulated / max(seconds.values())  # of a device, if its workers keep up
    if run.workers:
        seconds["data"] = data_seconds(step, worker_ms / 1e3, run.workers)
    images_per_s = step.images / max(seconds.values())
    an_image = compute_seconds(step, peak, mfu) / (step.batch * step.accumulated)
    far = network_seconds(step._replace(devices=_MANY), link_gbps or INFINIBAND)
    return Estimate(
        run=run,
        device=kind,
        memory=step.memory(),
        largest_batch=step.largest_batch(ROOM * kind.memory * _GIB),
        seconds=seconds,
        images_per_s=images_per_s,
        hours=None if run.images is None else run.images / images_per_s / 3600,
        workers=workers_needed(rate, worker_ms / 1e3),
        most_devices=int(step.images * an_image / far),
    )


def default_link(kind: Device, devices: int) -> float:
    """Gb/s from a GPU to the next, where nothing else is said."""
    return kind.link if devices <= MACHINE else INFINIBAND


def _sent(step: Step) -> str:
    if step.sharded:
        return f"each device sends {step.sent_bytes() / 1e9:.3g} GB of weights and gradients to others"
    centres = f"{step.centre_bytes / 1e6:.2g} MB of centres"
    return f"adds up {step.gradient_bytes / 1e6:.4g} MB of gradients and {centres} over the devices"


def _report(found: Estimate, mfu: float, worker_ms: float, link: float) -> str:
    run, kind, step = found.run, found.device, found.run.step
    accumulated = f" × {step.accumulated} accumulated" if step.accumulated > 1 else ""
    parts = "".join(f"    {name:26}{getattr(found.memory, field) / _GIB:8.2f}\n" for field, name in _PARTS.items())
    times = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in found.seconds.items())
    lines = [
        f"{run.title}, {_name(run.dtype)}",
        f"{step.devices} × {kind.title}, {step.batch} images a device{accumulated}: {step.images} a step. On paper: nothing was run.",
        "",
        f"operations  {step.flops / 1e9:.4g} GFLOP an image, {step.flops * step.images / 1e12:.4g} TFLOP a step",
        f"bytes       {run.crop_bytes / 1e6:.2f} MB of crops an image; a step moves {step.moved_bytes() / 1e9:.3g} GB or more in a device's",
        f"            memory, and {_sent(step)}",
        "memory      of a device, GiB",
        f"{parts}    {'in all':26}{found.memory.total / _GIB:8.2f} of {kind.memory}, workspace left out",
        f"    {_fit(found)}",
    ]
    if run.counted:
        lines.append(
            "    activations were counted from a call of this backbone with every layer in that precision and attention that is not fused: "
            "a rough guess"
        )
    lines += [
        f"speed       {found.images_per_s:,.0f} images/s at an MFU of {mfu:g}, which is assumed; a step: {times}",
        f"time        {_duration(found)}",
        f"data        {found.workers} workers a device at {worker_ms:g} ms an image{_workers_said(run)}",
        f"bound by    {found.bound}; {'' if found.bound == 'data' else 'with fewer workers by data; '}{_network(found, link)}",
    ]
    return "\n".join(lines)


_PARTS = {
    "parameters": "parameters",
    "teacher": "teacher",
    "gradients": "gradients",
    "optimizer": "optimizer's moments",
    "half_weights": "weights in half precision",
    "images": "images",
    "activations": "activations",
    "logits": "logits",
    "loss": "targets, logits' gradient",
}


def _fit(found: Estimate) -> str:
    batch, most, share = found.run.step.batch, found.largest_batch, f"nine tenths of the {found.device.title}'s memory"
    if most == 0:
        return f"DOES NOT FIT, not even one image: {share} are {ROOM * found.device.memory:.3g} GiB"
    if not found.fits:
        return f"DOES NOT FIT: {batch} images a device; the largest number that does is {most} (--data.batch_size {most}), by {share}"
    return f"fits; up to {most} images a device would, in {share}"


def _duration(found: Estimate) -> str:
    if found.hours is None:
        return "unknown without the number of images: add --images N or --data.root FOLDER"
    days = f" ({found.hours / 24:.1f} days)" if found.hours >= 48 else ""
    return f"{found.hours:.3g} hours{days} for {found.run.images:,} images in all epochs"


def _workers_said(run: Run) -> str:
    return f"; {run.workers} are said" if run.workers else ""


def _network(found: Estimate, link: float) -> str:
    step = found.run.step
    if found.most_devices < 1:
        return "the network would bound these images a step on any other device"
    beyond = f"by the network beyond {found.most_devices:,} devices that share the {step.images:,} images a step"
    return beyond + (f" (links of {link:g} Gb/s here)" if step.devices > 1 else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
