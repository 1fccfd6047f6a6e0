"""Times of variants side by side: interleaved, in alternating order, compared pair by pair."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

BASE = "ours"


def parser(description: str, others: bool = True) -> argparse.ArgumentParser:
    """With the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=6, help="of all variants; fewer than six prove nothing")
    made.add_argument("--json", type=Path, help="write every round, the machine and the versions there")
    if others:
        made.add_argument("--reference", type=Path, help="a checkout of facebookresearch/dino, to be timed beside")
        made.add_argument("--lightly", action="store_true", help="time the package lightly beside")
    return made


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each variant returns (seconds, megabytes), round by round; every other round goes through them backwards."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name in list(variants) if i % 2 == 0 else reversed(variants):
            found[name].append(variants[name]())
    return found


def compare(title: str, found: Mapping[str, Sequence[float]], unit: str, per: float = 1.0, base: str = BASE) -> dict[str, dict[str, float]]:
    """Prints and returns the median of each variant, and of its ratio to ``base`` pair by pair, with the range."""
    print(f"{title}\n  {'':26}{unit:>10}   times ours (range)")
    summary = {}
    for name, values in found.items():
        ratios = [value / own for value, own in zip(values, found[base])]
        entry = {"median": statistics.median(values) / per, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        summary[name] = entry
        print(f"  {name:26}{entry['median']:10.4g}   {entry['ratio']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})", flush=True)
    return summary


def save(path: Path | None, results: object) -> None:
    if path is not None:
        path.write_text(json.dumps({"command": " ".join(sys.argv), "machine": machine(), "results": results}, indent=1) + "\n")


def machine() -> dict[str, str | int]:
    """Hardware and versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), cpu)
    found: dict[str, str | int] = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "torchvision", "lightning", "pillow", "simplejpeg", "lightly", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def seconds(device: torch.device) -> float:
    """A clock: the wall's where a device works beside the process, else what the process had of a processor, whatever runs beside it."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(device: torch.device) -> float:
    """The largest memory so far: of the device, or of this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
