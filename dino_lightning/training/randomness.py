"""Random numbers that depend on a key alone, so that neither workers, ranks nor interruptions change them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for a key of non-negative integers, e.g. (seed, epoch, sample, view)."""
    return np.random.default_rng(key)


@contextlib.contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Within it torch's generators start from ``key``; afterwards those of the host and of a CUDA ``device`` are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(generator(*key).integers(2**63)))
        yield
