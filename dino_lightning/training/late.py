"""What goes from the host to the device and back, so that neither waits for the other."""

import torch
from torch import Tensor


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. To a GPU from pinned memory: a copy from other memory waits for all that is under way."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


class LateReading:
    """A tensor on the device on its way to the host. Read a step later, the copy is long done."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> float | list[float]:
        """Its number or numbers; waits if the device is not there yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.tolist()
