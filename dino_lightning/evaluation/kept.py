"""What autograd keeps from a forward pass, counted by making it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(network: nn.Module, call: Callable[[], Any]) -> int:
    """Of a call of the network, each storage once and its parameters not. On the meta device nothing is computed."""
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes()
        return tensor  # which keeps the storage, and so its place, until the end

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storages.values())
