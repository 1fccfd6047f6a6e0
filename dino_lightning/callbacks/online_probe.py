"""A linear classifier on the teacher's features that learns beside DINO, from the same batches and without changing them."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning.classifiers.classification import accuracies, linear_head, without_repeats
from dino_lightning.losses.precision import without_autocast
from dino_lightning.losses.ranks import all_reduce
from dino_lightning.methods.base import Method
from dino_lightning.training.plan import images_per_step
from dino_lightning.training.randomness import seeded

_HOST = torch.device("cpu")


class OnlineProbe(Callback):
    """Logs ``train/probe_loss``, and ``val/probe_top1`` and ``val/probe_top5`` (fractions) at each validation with the two
    labelled loaders [bank, query].

    Trains on the features of the global crops as the teacher makes them, in float32, with an SGD (momentum 0.9, no weight decay)
    of its own: DINO's clipping, precision and schedules play no part, and its weights end as without this callback. A step is
    one of DINO's, over all ranks and micro-batches. Labels come with the batches, (views, labels (B,)); those of -1 are left
    out (a step without any label has loss NaN and no gradient). A resumed run goes on with it.

    The features change while it learns: it follows the run, but ``dino-lightning linear`` says what a checkpoint is worth.

    Args:
        num_classes: number of classes; by default that of a MultiCropDataModule on class folders.
        lr: learning rate for 256 images a step, scaled by the real number (batch size × devices × accumulated batches).
    """

    def __init__(self, num_classes: int | None = None, lr: float = 0.1) -> None:
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.num_classes, self.lr = num_classes, lr
        self._head: nn.Linear | None = None  # known with the width of the first features
        self._asked = False  # whether there were queries in this validation
        self._optimizer: torch.optim.SGD | None = None
        self._saved: dict[str, Any] = {}  # what a checkpoint holds of them
        self._images: int | None = None  # of a step
        self._labels: Tensor | None = None  # of the batch under way
        self._sums: list[Tensor] = []  # since the last step: gradients of the summed loss, that loss, and the number of samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Method):
            raise TypeError(f"OnlineProbe is for a method of this package such as DINOModule, got {type(pl_module).__name__}")
        self._classes = self.num_classes or len(getattr(trainer.datamodule, "classes", None) or ())
        if self._classes < 2:
            raise ValueError(
                "OnlineProbe needs labels, and the training data name no classes: give a folder with class folders, or "
                "num_classes with batches (views, labels)"
            )
        self._head, self._optimizer, self._saved = None, None, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._labels, self._sums = None, None, []
        self._metrics = accuracies(self._classes).to(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[0], list | tuple) else None
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            raise TypeError("OnlineProbe needs batches (views, labels) with integer labels (B,), -1 where there is none")
        if self._images is None:  # the first batch; the host waits for no later one
            if labels.max() >= self._classes:
                raise ValueError(f"a label is {int(labels.max())}, but with num_classes={self._classes} they end before that")
            self._images = images_per_step(trainer, first_batch_size=len(labels))
        self._labels = labels

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up the gradients of a micro-batch. Each of its global crops counts as a sample."""
        seen, (labels, self._labels) = pl_module.observed, (self._labels, None)
        if seen is None:
            raise RuntimeError("OnlineProbe found no features: the training step did not set `observed`, as those of the methods do")
        features = seen.features.detach().float()  # (2·B, D)
        labels = labels.repeat(len(features) // len(labels))  # views-major
        head = self._head or self._begin(features)
        with torch.enable_grad(), without_autocast(features.device):
            loss = F.cross_entropy(head(features), labels, ignore_index=-1, reduction="sum")
            gradients = torch.autograd.grad(loss, list(head.parameters()))
        sums = [*gradients, loss.detach(), (labels >= 0).sum().to(loss)]
        self._sums = [a + b for a, b in zip(self._sums, sums)] if self._sums else sums

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        # Before DINO's step and so before every checkpoint of it, whatever the order of the callbacks.
        if not self._sums:  # training steps that gave None
            return
        flat = all_reduce(torch.cat([value.flatten() for value in self._sums]))
        self._sums = []
        *gradients, loss, count = flat.split([*(p.numel() for p in self._head.parameters()), 1, 1])
        for parameter, gradient in zip(self._head.parameters(), gradients):
            parameter.grad = gradient.view_as(parameter) / count.clamp(min=1)
        self._optimizer.param_groups[0]["lr"] = self.lr * self._images / 256
        self._optimizer.step()
        pl_module.log("train/probe_loss", (loss / count).squeeze())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx != 1 or self._head is None or trainer.sanity_checking:
            return
        labels = without_repeats(outputs["labels"], trainer, batch_idx, dataloader_idx)
        with torch.no_grad(), without_autocast(labels.device):
            self._metrics.update(self._head(outputs["features"].float()), labels)
        self._asked = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._asked:  # no loader of queries
            return
        self._asked = False
        values = self._metrics.compute()
        self._metrics.reset()
        pl_module.log_dict({f"val/probe_{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        if self._head is None:
            return self._saved
        return {"head": self._head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _begin(self, features: Tensor) -> nn.Linear:
        """The same classifier on all ranks, or that of the checkpoint; drawn so that other random numbers stay as they are."""
        with seeded(_HOST, 0):
            self._head = head = linear_head(features.shape[1], self._classes).to(features)
        self._optimizer = torch.optim.SGD(head.parameters(), lr=self.lr, momentum=0.9)
        if self._saved:
            head.load_state_dict(self._saved["head"])
            self._optimizer.load_state_dict(self._saved["optimizer"])
            self._saved = {}
        return head
