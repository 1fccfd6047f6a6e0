"""What the losses compute in, whatever the autocast."""

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """Half precision to float32; anything wider stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
