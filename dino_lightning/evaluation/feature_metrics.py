"""What labelled features are worth, as a metric that collects them over batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dino_lightning.evaluation.knn import knn_accuracy
from dino_lightning.evaluation.spread import rank_me


class FeatureMetrics(Metric):
    """Weighted k-NN accuracy of queries against a bank, and RankMe (effective rank) of the bank.

    ``compute`` gives "knn_top1" and "knn_top5" as fractions and "rank_me", the same on every rank: those of one process with all
    samples, whatever rank had which. Samples with label -1 are left out: without a label, or counted on another rank.

    Args:
        k: neighbours; clamped to the size of the bank.
        temperature: of the votes.
    """

    full_state_update = False
    bank: list[Tensor]
    bank_labels: list[Tensor]
    queries: list[Tensor]
    query_labels: list[Tensor]

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor, *, is_bank: bool) -> None:
        """Takes features (B, D) and labels (B,), of the bank or of the queries."""
        labelled = labels >= 0
        (self.bank if is_bank else self.queries).append(features[labelled].float())
        (self.bank_labels if is_bank else self.query_labels).append(labels[labelled])

    @property
    def is_fed(self) -> bool:
        """Whether there are both a bank and queries."""
        return bool(len(self.bank)) and bool(len(self.queries))

    def compute(self) -> dict[str, Tensor]:
        """``knn_top1``, ``knn_top5`` (fractions) and ``rank_me`` of the bank, scalars, of the samples of all ranks."""
        bank, bank_labels, queries, query_labels = (dim_zero_cat(getattr(self, name)) for name in _STATES)
        top1, top5 = knn_accuracy(bank, bank_labels, queries, query_labels, k=self.k, temperature=self.temperature)
        values = {"knn_top1": top1, "knn_top5": top5, "rank_me": rank_me(bank)}
        # On the device of the features, so that ranks can average what they log: NCCL takes no tensors of the host.
        return {name: torch.tensor(value, device=bank.device) for name, value in values.items()}


_STATES = ("bank", "bank_labels", "queries", "query_labels")
