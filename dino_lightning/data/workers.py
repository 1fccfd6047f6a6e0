"""Loaders, and their worker processes: these outlive the signals that a cluster sends to a whole job, and never their parent."""

import os
import signal
import threading
from multiprocessing import parent_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

_SECONDS = 1.0  # between two looks whether the parent still lives


def cores() -> int:
    """CPU cores that this process may use, which on a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader(dataset: Dataset, batch_size: int, num_workers: int, **options: Any) -> DataLoader:
    """Batches made by ``num_workers`` processes that stay from epoch to epoch; other ``options`` are DataLoader's."""
    return DataLoader(
        dataset,
        batch_size=batch_size,  # by its name: Lightning makes the loader anew for predictions
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # idle ones share the memory of their parent; 16 new ones took a second
        worker_init_fn=follow_the_parent,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def follow_the_parent(worker: int) -> None:
    """A ``worker_init_fn``: only the parent decides when a worker ends.

    SLURM and others send SIGTERM to all processes of a job, a terminal sends SIGINT, and a run that finishes its step first needs
    its workers for that. So these are not heeded, unless SIGTERM comes from the parent (multiprocessing sends it once, at the
    parent's exit, and then waits for ever), or the parent is gone. Where the system does not tell who sent a signal
    (all but Linux), SIGTERM ends a worker as ever. Programs that a worker starts inherit that SIGTERM is blocked: end them by kill.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for threads that begin later too
        threading.Thread(target=_watch, args=(parent_process().pid, os.getppid()), daemon=True).start()


def _watch(parent: int, adopter: int) -> None:
    """Ends the process when the ``parent`` asks for it, or when another process than ``adopter`` has it: the parent died."""
    while os.getppid() == adopter:
        received = signal.sigtimedwait([signal.SIGTERM], _SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)  # not a failure, about which the loader of a parent that is ending would complain
