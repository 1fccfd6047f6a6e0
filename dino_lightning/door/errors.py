"""Errors of the user: which these are, and how they are told in one to three lines."""

import sys

_LINES = 3
_BY_NAME = {"MisconfigurationException", "NonFiniteLossError", "UnreadableImagesError", "UnreadableImage"}  # whose classes need torch

# Words of torch (of its loader, its process groups) in lower case, and what to do where these are the reason; the first that are said count.
_REMEDIES = {
    ("out of shared memory", "killed by signal: bus error", "unable to allocate shared memory", "unable to open shared memory"): (
        "prefetched batches lie in shared memory (/dev/shm), of which a container has 64 MB: start it with --ipc=host or --shm-size=8g, or "
        "take fewer --data.num_workers or a smaller --data.batch_size"
    ),
    ("can't allocate memory", "out of memory"): (
        "a run needs less with a smaller --data.batch_size (and --trainer.accumulate_grad_batches), fewer local crops or --trainer.precision "
        "bf16-mixed (dino-lightning estimate says what takes how much), a tool with a smaller --batch_size or --image_size"
    ),
    ("killed by signal", "exited unexpectedly"): (
        "a worker process of the loader is gone; if nobody ended it, the system did, for want of memory (dmesg says so): take fewer "
        "--data.num_workers, and go on with --ckpt_path last"
    ),
    ("connection closed by peer", "connection reset by peer", "remote process exited"): (
        "another rank of this run has ended, of which its own log, or dmesg on its machine, says why; go on with --ckpt_path last"
    ),
}


class UsageError(ValueError):
    """The arguments are not those that a command takes."""


def of_the_user(error: Exception) -> bool:
    """Whether the message says what to do, so that a traceback would only hide it."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("dino_lightning")  # an optional extra
    if remedy(error):
        return True
    return isinstance(error, ValueError | TypeError | OSError) or any(kind.__name__ in _BY_NAME for kind in type(error).__mro__)


def tell(error: Exception, hint: str = "") -> None:
    """Prints the error on stderr, with the hint in a line of its own."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    hints = [remedy(error), hint]
    print("\n".join([f"dino-lightning: error: {lines[0]}", *lines[1 : _LINES - 1], *filter(None, hints)]), file=sys.stderr)


def remedy(error: BaseException | None) -> str:
    """What to do about an error of torch whose words do not say it, also where it is the cause of another one; "" without."""
    said = ""
    while error is not None:
        said += "out of memory" if isinstance(error, MemoryError) else str(error).lower() if isinstance(error, RuntimeError) else ""
        error = error.__cause__
    return next((found for words, found in _REMEDIES.items() if any(word in said for word in words)), "")
