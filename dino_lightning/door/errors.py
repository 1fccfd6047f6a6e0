"""Errors of the user: which these are, and how they are told in one to three lines."""

import sys

_LINES = 3
_BY_NAME = {"MisconfigurationException", "NonFiniteLossError", "UnreadableImagesError", "UnreadableImage"}  # whose classes need torch

# What torch says where the batches that workers prepare do not fit in /dev/shm.
_SHARED_MEMORY = ("out of shared memory", "killed by signal: Bus error", "unable to allocate shared memory", "unable to open shared memory")
_MORE = (
    "prefetched batches lie in shared memory (/dev/shm), of which a container has 64 MB: start it with --ipc=host or --shm-size=8g, or take "
    "fewer --data.num_workers or a smaller --data.batch_size"
)
# And where a device or the machine has no room for a tensor.
_MEMORY = ("can't allocate memory", "out of memory")
_LESS = (
    "dino-lightning estimate, with the options of the run, says what needs how much: a smaller --data.batch_size (with "
    "--trainer.accumulate_grad_batches for steps of as many images), fewer local crops or --trainer.precision bf16-mixed need less"
)


class UsageError(ValueError):
    """The arguments are not those that a command takes."""


def of_the_user(error: Exception) -> bool:
    """Whether the message says what to do, so that a traceback would only hide it."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("dino_lightning")  # an optional extra
    if _lacks_shared_memory(error) or _lacks_memory(error):
        return True
    return isinstance(error, ValueError | TypeError | OSError) or any(kind.__name__ in _BY_NAME for kind in type(error).__mro__)


def tell(error: Exception, hint: str = "") -> None:
    """Prints the error on stderr, with the hint in a line of its own."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    hints = [_MORE if _lacks_shared_memory(error) else _LESS if _lacks_memory(error) else "", hint]
    print("\n".join([f"dino-lightning: error: {lines[0]}", *lines[1 : _LINES - 1], *filter(None, hints)]), file=sys.stderr)


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY))


def _lacks_shared_memory(error: BaseException | None) -> bool:
    """Also as the cause of another error: a worker's death is told by the loader."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _SHARED_MEMORY):
            return True
        error = error.__cause__
    return False
