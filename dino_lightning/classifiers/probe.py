"""LinearProbe: linear classifiers on a frozen backbone, one for each of several learning rates, in one pass over the data."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dino_lightning.backbones import example_images
from dino_lightning.classifiers.classification import Standing, Standings, accuracies, cross_entropy, linear_head, without_repeats
from dino_lightning.evaluation.linear import linear_protocol, probe_features
from dino_lightning.losses.precision import without_autocast
from dino_lightning.training.plan import images_per_step
from dino_lightning.training.schedules import cosine_schedule

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class LinearProbe(LightningModule):
    """How well linear classifiers tell classes from frozen features (paper, section 4.1), for several learning rates at once.

    The protocol of the reference: SGD with momentum 0.9 and no weight decay, a cosine per epoch to 0 over ``max_epochs`` of the
    Trainer (the reference has 100), classifiers from N(0, 0.01²). All rates see the same batches and begin with the same
    weights; each ends as if it were alone. Which rate and which epoch are best is seen on the validation data, so what they
    reach there is optimistic; ``results()`` gives the last epoch as well.

    Trains on (images (B, C, H, W), labels (B,)), normalised as for the backbone; or, without one, on (features (B, F),
    labels), extracted once. Samples with label -1 are left out. Logs ``val/linear_top1_lr_RATE`` and ``..._top5_lr_RATE`` for
    each rate, and ``val/linear_top1`` and ``val/linear_top5`` of the rate that is best in the epoch; ``test/...`` in a test run.

    Args:
        backbone: maps images to features (B, D). It is frozen, and in evaluation mode whatever the mode of this module. Not
            kept in the hyper-parameters: ``LinearProbe.load_from_checkpoint(path, backbone=...)``.
        num_classes: number of classes.
        rates: learning rates for 256 images a step: each is scaled by the real number (batch size × devices × accumulated
            batches).
        n_blocks: class tokens of so many last blocks of a ViT; by default those of ``evaluation.linear_protocol``.
        mean_patch: also the mean patch token; by default that of the protocol.
        in_features: width F of the features; needed without a backbone, else found by a forward pass.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        num_classes: int,
        rates: Sequence[float] = RATES,
        n_blocks: int | None = None,
        mean_patch: bool | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        rates = tuple(float(rate) for rate in rates)
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError(f"rates must be positive numbers, none twice, got {rates}")
        self.save_hyperparameters(ignore=["backbone"])
        self.rates = rates
        self.backbone = backbone
        if backbone is None:
            if in_features is None or n_blocks is not None or mean_patch is not None:
                raise ValueError(
                    "without a backbone the batches hold features: give in_features, their width, and neither n_blocks nor "
                    f"mean_patch; got in_features={in_features}, n_blocks={n_blocks}, mean_patch={mean_patch}"
                )
        else:
            backbone.requires_grad_(False).eval()
            usual = linear_protocol(backbone)
            self.n_blocks = usual[0] if n_blocks is None else n_blocks
            self.mean_patch = usual[1] if mean_patch is None else mean_patch
            if in_features is None:
                in_features = self.features(example_images(backbone, 224, 3)).shape[1]
        self.heads = nn.ModuleList(linear_head(in_features, num_classes) for _ in rates)
        for head in self.heads:  # a fair comparison
            head.load_state_dict(self.heads[0].state_dict())
        self.metrics = nn.ModuleList(accuracies(num_classes) for _ in rates)
        self.standings = Standings(len(rates))

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → features (B, F) in float32; what are features already stay as they are."""
        if self.backbone is None:
            return images.float()
        return probe_features(self.backbone, images, n_blocks=self.n_blocks, mean_patch=self.mean_patch)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), or features (B, F) without a backbone → logits (rates, B, K) in float32."""
        features = self.features(images)
        with without_autocast(features.device):
            return torch.stack([head(features) for head in self.heads])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """(images, labels) → the sum of the losses: no classifier plays a part in the gradient of another."""
        images, labels = batch[:2]
        losses = torch.stack([cross_entropy(logits, labels) for logits in self(images)])
        self.log_dict({f"train/linear_loss_lr_{rate:g}": loss for rate, loss in zip(self.rates, losses.detach())})
        return losses.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch[:2]
        labels = without_repeats(labels, self.trainer, batch_idx)
        for metrics, logits in zip(self.metrics, self(images)):
            metrics.update(logits, labels)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _log(self, stage: str) -> None:
        values = torch.stack([torch.stack([value["top1"], value["top5"]]) for value in (m.compute() for m in self.metrics)])
        for metrics in self.metrics:
            metrics.reset()
        if self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == "fit":
            self.standings.note(self.current_epoch, values)
        named = {f"_lr_{rate:g}": value for rate, value in zip(self.rates, values)} | {"": values[values[:, 0].argmax()]}
        self.log_dict({f"{stage}/linear_top1{name}": value[0] for name, value in named.items()}, sync_dist=True)
        self.log_dict({f"{stage}/linear_top5{name}": value[1] for name, value in named.items()}, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        epochs = self.trainer.max_epochs
        if not epochs or epochs < 1:
            raise ValueError(f"the learning rates fall to 0 over the run; set Trainer(max_epochs=100), got {epochs}")
        self.trainer.fit_loop.setup_data()  # else the loader is not there yet
        scale = images_per_step(self.trainer) / 256
        groups = [{"params": list(head.parameters()), "lr": rate * scale} for rate, head in zip(self.rates, self.heads)]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = LambdaLR(optimizer, lambda epoch: cosine_schedule(epoch, base_value=1.0, final_value=0.0, total_steps=epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def setup(self, stage: str) -> None:
        # The backbone is meant to be in evaluation mode.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def results(self) -> dict[float, Standing]:
        """What each rate reached on the validation data, in the last epoch and in the best.

        Raises:
            RuntimeError: before the first validated epoch.
        """
        return dict(zip(self.rates, self.standings.read()))
