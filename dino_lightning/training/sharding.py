"""Weights, gradients and moments in shards over all devices (FSDP2), for networks that a device does not hold whole."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dino_lightning.backbones import VisionTransformer
from dino_lightning.losses.ranks import all_reduce


class ShardedStrategy(ModelParallelStrategy):
    """``Trainer(strategy="sharded")``: Lightning's strategy for FSDP2, over all devices, with a checkpoint in one file.

    Such a checkpoint is that of a run without shards: it loads anywhere, and a run goes on from it on any number of devices.

    Args:
        process_group_backend: of torch.distributed; by default NCCL on GPUs, gloo on CPUs.
        timeout: of the process group.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Lightning's own two number the states of parameters otherwise than an optimizer does, and so take only each other's.
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What ``optimizer.state_dict()`` is of whole tensors, on the CPU; empty but on rank 0."""
        saved, state = getattr(optimizer, "_optimizer", optimizer).state_dict(), {}
        for number, held in saved["state"].items():
            whole = {
                name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in held.items()
            }  # all ranks together
            if self.global_rank == 0:
                state[number] = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in whole.items()}
        return {**saved, "state": state} if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = torch.load(self.broadcast(checkpoint_path), mmap=True, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True, strict=self.lightning_module.strict_loading)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ())):
            state = {}
            for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                for parameter, number in zip(group["params"], saved_group["params"], strict=True):
                    held = saved["state"].get(number, {})
                    state[number] = {name: _like(parameter, value) for name, value in held.items()}
            groups = [{**group, "fused": None} for group in saved["param_groups"]]  # which another device may have had
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        return checkpoint


StrategyRegistry.register("sharded", ShardedStrategy, description="FSDP2 for the methods of dino_lightning")


def _like(parameter: Tensor, value: Any) -> Any:
    """This rank's shard of a moment, as that of the parameter; counts of steps as they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_sharded(trainer: Trainer | None) -> bool:
    """Whether the run's weights are in shards; False without a Trainer."""
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def shard(networks: Iterable[nn.Module], mesh: Any) -> None:
    """Distributes the parameters of networks over the devices of a mesh: the blocks of ViTs one by one, and each other part.

    A part is put together only while it computes. That of a teacher too, which has no backward pass after which FSDP would otherwise
    take it apart: its moving average is of shards.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for network in networks:
        for part in network.children():
            if isinstance(part, VisionTransformer):
                for block in part.blocks:
                    fully_shard(block, mesh=mesh, reshard_after_forward=True)
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
            if isinstance(part, VisionTransformer):
                for method in ("forward_features", "forward_kept", "get_cls_attention", "get_last_selfattention"):
                    register_fsdp_forward_method(part, method)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank has of each: a view of its shard, or the tensor itself."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms_of_all(tensors: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """The norms of whole tensors, of those of their shards here."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return list(norms)
    squares = torch.stack(list(norms)).square()
    all_reduce(squares)
    return list(squares.sqrt().unbind())
