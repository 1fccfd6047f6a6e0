"""k-NN accuracy of the teacher's features during training: the number that says whether the run learns anything."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.spread import rank_me


class OnlineKNN(Callback):
    """Logs ``val/knn_top1`` and ``val/knn_top5`` (fractions) at each validation with the two labelled loaders [bank, query], and
    ``val/rank_me``, the effective rank of the bank's features; ``test/...`` in a test run.

    Exact on any number of ranks. Without labelled loaders it does nothing; ``Trainer(check_val_every_n_epoch=n)`` says how
    often it runs.

    Args:
        k: neighbours; clamped to the size of the bank.
        temperature: of the votes.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature
        self._batches: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]] = ([], [])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = ([], [])

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = ([], [])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batches[dataloader_idx].append(outputs)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test", trainer.test_dataloaders)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: list) -> None:
        bank, queries = self._batches
        self._batches = ([], [])
        if trainer.sanity_checking or not bank or not queries:
            return
        gathered = [_gather(trainer, loader, batches) for loader, batches in zip(loaders, (bank, queries))]
        top1, top5 = knn_accuracy(*gathered[0], *gathered[1], k=self.k, temperature=self.temperature)
        # The same numbers on every rank, and logged on every rank, so that callbacks can monitor them on each.
        pl_module.log_dict({f"{stage}/knn_top1": top1, f"{stage}/knn_top5": top5}, prog_bar=True, sync_dist=True)
        pl_module.log(f"{stage}/rank_me", rank_me(gathered[0][0]), sync_dist=True)


def _gather(trainer: Trainer, loader: DataLoader, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of a loader over all ranks, each labelled sample once and in order."""
    features, labels = (torch.cat([batch[name] for batch in batches]) for name in ("features", "labels"))
    if trainer.world_size > 1 and isinstance(loader.sampler, DistributedSampler):  # without, each rank has all
        # Lightning deals the samples out in turn and repeats some, so that the ranks have the same number.
        count = len(loader.dataset)
        features, labels = (
            trainer.strategy.all_gather(mine).transpose(0, 1).flatten(0, 1)[:count] for mine in (features, labels)
        )
    return features[labels >= 0], labels[labels >= 0]
