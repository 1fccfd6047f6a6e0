"""What classifiers on labelled images share: a head, its loss, accuracies over all ranks, the last and the best epoch."""

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def linear_head(in_features: int, num_classes: int) -> nn.Linear:
    """An untrained classifier: weights from N(0, 0.01²), biases 0."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    head = nn.Linear(in_features, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean in float32 over the samples that have a label: logits (B, K), labels (B,), -1 without; 0 if none has one."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    return total / (labels >= 0).sum().clamp(min=1)


def accuracies(num_classes: int) -> MetricCollection:
    """ "top1" and "top5" as fractions over all ranks, without samples of label -1; below five classes, top-5 is top-all."""
    ranks = {"top1": 1, "top5": min(5, num_classes)}
    metrics = {
        name: MulticlassAccuracy(num_classes, top_k=k, average="micro", ignore_index=-1, validate_args=False) for name, k in ranks.items()
    }
    # torchmetrics would group what agrees on the first batch, which may be chance.
    return MetricCollection(metrics, compute_groups=False)


def without_repeats(labels: Tensor, trainer: Trainer, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
    """Labels (B,) of a batch of validation or test, -1 for the samples that count on another rank, or earlier on this one.

    Lightning deals the samples out in turn and repeats some, so that all ranks have as many. Without its sampler, every rank
    has all: those of the first count.
    """
    if trainer.world_size == 1:
        return labels
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    if not isinstance(loader.sampler, DistributedSampler):
        return labels if trainer.is_global_zero else torch.full_like(labels, -1)
    mine = batch_idx * loader.batch_size + torch.arange(len(labels), device=labels.device)
    return labels.where(mine * trainer.world_size + trainer.global_rank < len(loader.dataset), -1)


class Standing(NamedTuple):
    """(top-1, top-5) as fractions in the last epoch and in the one with the best top-1, counted from 0."""

    last: tuple[float, float]
    best: tuple[float, float]
    best_epoch: int


class Standings(nn.Module):
    """The last and the best accuracies of ``count`` classifiers. A module, so that checkpoints hold them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("last", torch.full((count, 2), torch.nan))
        self.register_buffer("best", torch.full((count, 2), -1.0))
        self.register_buffer("best_epoch", torch.full((count,), -1))

    @torch.no_grad()
    def note(self, epoch: int, values: Tensor) -> None:
        """Takes the accuracies (count, 2) of an epoch; of equal ones the first stays the best."""
        better = values[:, 0] > self.best[:, 0]
        self.last.copy_(values)
        self.best.copy_(torch.where(better[:, None], values, self.best))
        self.best_epoch.masked_fill_(better, epoch)

    def read(self) -> list[Standing]:
        """One for each classifier.

        Raises:
            RuntimeError: if no epoch was validated.
        """
        if self.last.isnan().any():
            raise RuntimeError("there is no accuracy yet: no epoch was validated")
        values = zip(self.last.tolist(), self.best.tolist(), self.best_epoch.tolist())
        return [Standing(tuple(last), tuple(best), epoch) for last, best, epoch in values]
