"""Work on the next batch beside the training step under way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A CUDA stream of its own for copying and painting batches.

    The host is ahead of the device: what it hands to this stream runs while the device is still busy with the step before, which
    leaves parts of it idle. On other devices nothing happens.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # made by the process that uses it

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within it, what is launched for this device goes to the stream."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            yield

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        """The current stream waits until the tensors of this one are there, and their memory is kept until it is done with them."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)
