"""k-NN accuracy of the teacher's features during training: the number that says whether the run learns anything."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_lightning.classifiers.classification import without_repeats
from dino_lightning.evaluation import FeatureMetrics


class OnlineKNN(Callback):
    """Logs ``val/knn_top1`` and ``val/knn_top5`` (fractions) at each validation with the two labelled loaders [bank, query], and
    ``val/rank_me``, the effective rank of the bank's features; ``test/...`` in a test run.

    With ``Trainer(num_sanity_val_steps=-1)`` also before the first step: what a run that starts from weights must not lose.
    Exact on any number of ranks. Without labelled loaders it does nothing (with one alone it says so);
    ``Trainer(check_val_every_n_epoch=n)`` says how often it runs.

    Args:
        k: neighbours; clamped to the size of the bank.
        temperature: of the votes.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.metrics = FeatureMetrics(k, temperature)
        self._warned = False
        self.before: float | None = None  # top-1 before the first step, where it was asked

    def state_dict(self) -> dict[str, float | None]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        self.before = state_dict["before"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = len(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        if loaders == 1 and not self._warned:
            self._warned = True
            rank_zero_warn("OnlineKNN needs two loaders of (images, labels), [bank, queries], and there is one: no k-NN accuracy")
        self.metrics.reset()
        self.metrics.to(pl_module.device)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_epoch_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Lightning's check before the training takes a few batches, or with -1 all; of a resumed run it says nothing new.
        if trainer.sanity_checking and (trainer.num_sanity_val_steps != float("inf") or trainer.global_step):
            return
        labels = without_repeats(outputs["labels"], trainer, batch_idx, dataloader_idx)
        self.metrics.update(outputs["features"], labels, is_bank=dataloader_idx == 0)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.metrics.is_fed:
            return
        values = {f"{stage}/{name}": value for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        if trainer.sanity_checking:  # in which Lightning logs nothing
            self.before, top5 = (values[f"{stage}/knn_{name}"].item() for name in ("top1", "top5"))
            rank_zero_info(f"before the first step: k-NN top-1 {100 * self.before:.1f} %, top-5 {100 * top5:.1f} %")
            for logger in trainer.loggers:
                logger.log_metrics({name: value.item() for name, value in values.items()}, step=0)
            return
        # The same numbers on every rank, and logged on every rank, so that callbacks can monitor them on each.
        rank = values.pop(f"{stage}/rank_me")
        pl_module.log_dict(values, prog_bar=True, sync_dist=True)
        pl_module.log(f"{stage}/rank_me", rank, sync_dist=True)
