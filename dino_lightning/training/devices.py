"""Settings of devices that change no numbers and make a run faster."""

from collections.abc import Iterable

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def settle(strategy: Strategy, networks: Iterable[nn.Module]) -> None:
    """Prepares networks that are about to be trained.

    Over several devices, gradients are views of what is sent around, and buffers are not sent at every forward pass (unless batch
    norms keep running statistics): centres are the same everywhere anyway. What the strategy was told otherwise stays. On GPUs
    the weights of convolutions lie as their kernels read them.
    """
    if isinstance(strategy, DDPStrategy):
        has_statistics = any(isinstance(module, _BatchNorm) for network in networks for module in network.modules())
        for name, value in {"gradient_as_bucket_view": True, "broadcast_buffers": has_statistics}.items():
            strategy._ddp_kwargs.setdefault(name, value)
    if strategy.root_device.type == "cuda" and not isinstance(strategy, ModelParallelStrategy):  # which shards contiguous weights only
        for network in networks:
            network.to(memory_format=torch.channels_last)
