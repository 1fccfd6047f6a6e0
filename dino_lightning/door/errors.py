"""Errors of the user: which these are, and how they are told in one to three lines."""

import sys

_LINES = 3
_BY_NAME = {"MisconfigurationException", "NonFiniteLossError", "UnreadableImagesError", "UnreadableImage"}  # whose classes need torch


class UsageError(ValueError):
    """The arguments are not those that a command takes."""


def of_the_user(error: Exception) -> bool:
    """Whether the message says what to do, so that a traceback would only hide it."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("dino_lightning")  # an optional extra
    return isinstance(error, ValueError | TypeError | OSError) or any(kind.__name__ in _BY_NAME for kind in type(error).__mro__)


def tell(error: Exception, hint: str = "") -> None:
    """Prints the error on stderr, with the hint in a line of its own."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    print("\n".join([f"dino-lightning: error: {lines[0]}", *lines[1 : _LINES - 1], *filter(None, [hint])]), file=sys.stderr)
