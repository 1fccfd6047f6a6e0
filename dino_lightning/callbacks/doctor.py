"""The collapse doctor: whether a run learns, in numbers at every step, and in words when it does not."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dino_lightning.callbacks.online_knn import OnlineKNN
from dino_lightning.evaluation.collapse import (
    Signs,
    Verdict,
    diagnose,
    forgetting,
    is_stuck,
    off_the_curve,
    stuck,
    too_many_prototypes,
)
from dino_lightning.evaluation.spread import feature_std, participation_ratio, view_agreement
from dino_lightning.losses.ranks import all_reduce
from dino_lightning.training.late import LateReading

log = logging.getLogger(__name__)

_WINDOW = 20  # batches
_PATIENCE = 0.01  # of the run's steps
_OF_PATCHES = ("patch_entropy", "patch_prototypes", "koleo_distance", "masked")


class CollapseDoctor(Callback):
    """Watches a run for the ways in which DINO and its like fail, and says once what is wrong and what helps.

    A falling loss can be collapse, so it looks at the features and prototypes. It logs
    ``train/feature_std`` and ``train/feature_rank`` of the teacher's features (1 and their width when they spread into all
    directions, 0 and 1 when they are dead); ``train/view_agreement`` (1: both global views of an image look the same to the
    teacher); and ``train/prototypes_used``, the share that was anyone's strongest within the last 20 batches. Nothing waits for
    the device: numbers are means over 20 batches and all ranks and are read one step later.

    Of a method without prototypes it judges what it knows: the features and the loss.

    A verdict is given if it holds for three windows and one per cent of the run's steps on end; as a warning, and as
    ``doctor/NAME`` in the loggers. ``docs/troubleshooting.md`` has the table of verdicts.

    Args:
        stop: end the run at the first verdict on the training (on all ranks, after the same step).
        expected_loss: step → training loss of a recipe whose course is known (of DINOv2, the class tokens' part of it).
    """

    def __init__(self, stop: bool = False, expected_loss: Mapping[int, float] | None = None) -> None:
        self.stop = stop
        self.expected_loss = {int(step): loss for step, loss in (expected_loss or {}).items()}  # keys of a YAML file are text
        self._told: list[str] = []
        self._first: dict[str, float] = {}  # loss, rank and spread at the beginning

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        options = pl_module.options
        self._out_dim = options.get("out_dim", 1)  # without prototypes their signs are NaN, and verdicts on them cannot be
        self._patch_out_dim = options.get("ibot_out_dim" if options.get("ibot_separate_head") else "out_dim", 1)
        self._suspected, self._lasted, self._stuck, self._judged = "", 0, 0, 0
        self._share_used: Tensor | None = None  # known after a window
        self._reading: tuple[LateReading, int] | None = None
        self._begin(pl_module.device)
        if trainer.global_step == 0:
            self._told, self._first = [], {}
            images = _training_images(trainer)
            self._tell(trainer, too_many_prototypes(self._out_dim, images) if images else None)

    def state_dict(self) -> dict[str, Any]:
        return {"told": list(self._told), "first": dict(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._told, self._first = list(state_dict["told"]), dict(state_dict["first"])

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._reading is not None:
            self._judge(trainer)
        seen = pl_module.observed
        if seen is None:  # a training step of another's
            return
        features, logits, center = seen  # (2·B, D), (2·B, K), (1, K)
        spread = [feature_std(features), participation_ratio(features), view_agreement(*features.chunk(2))]
        numbers = dict(zip(("feature_std", "feature_rank", "view_agreement"), spread))
        if not isinstance(outputs, Mapping):
            pl_module.report(numbers)
            return
        missing = torch.full_like(spread[0], torch.nan)
        entropy, kl, *patches = (outputs.get(name, missing) for name in ("teacher_entropy", "kl", *_OF_PATCHES))
        # Of DINOv2 the class tokens' part. Lightning has divided the whole one by the accumulated batches.
        loss = entropy + kl if "kl" in outputs else outputs["loss"] * trainer.accumulate_grad_batches
        first = [value * _WINDOW for value in spread[:2]] if trainer.global_step <= 1 and self._batches == 0 else [0 * spread[0]] * 2
        signs = torch.stack([loss, entropy, kl, *spread, *patches, *first])
        known = signs.isfinite()
        self._sums += torch.stack([torch.where(known, signs, 0), known.to(signs)])
        if logits is not None:
            strongest = (logits if center is None else logits - center).argmax(dim=1)
            self._chosen.scatter_add_(0, strongest, torch.ones_like(strongest))  # bincount would wait for the device
        self._batches += 1
        if self._batches == _WINDOW:
            self._close(trainer, pl_module.device)
        has_share = logits is not None and self._share_used is not None
        pl_module.report({**numbers, "prototypes_used": self._share_used} if has_share else numbers)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that began with trained weights must not lose what they knew."""
        if trainer.state.fn != TrainerFn.FITTING:
            return  # what was known before is of the run's images, not of these
        before = next((callback.before for callback in trainer.callbacks if isinstance(callback, OnlineKNN)), None)
        now = trainer.callback_metrics.get("val/knn_top1")
        if pl_module.started_from and before is not None and now is not None and not trainer.sanity_checking:
            self._tell(trainer, forgetting(before, now.item()))

    def summary(self, trainer: Trainer) -> str:
        """What it has seen, for the end of a run; empty where it saw nothing."""
        std, rank = (float(trainer.callback_metrics.get(f"train/feature_{name}", math.nan)) for name in ("std", "rank"))
        if math.isnan(std):
            return ""
        numbers = f"spread of the features {std:.2f} (0 if collapsed), effective rank in a batch {rank:.1f} (1 if collapsed)"
        if self._told:
            return f"{', '.join(self._told)} (docs/troubleshooting.md); {numbers}"
        return f"{'nothing wrong seen' if self._judged >= 3 else 'too short a run to tell'}; {numbers}"

    def _begin(self, device: torch.device) -> None:
        self._batches = 0
        self._sums = torch.zeros(2, 8 + len(_OF_PATCHES), device=device)  # and how often each was known
        self._chosen = torch.zeros(self._out_dim, dtype=torch.long, device=device)

    def _close(self, trainer: Trainer, device: torch.device) -> None:
        """The window's numbers over all ranks set out for the host."""
        sums, chosen = all_reduce(self._sums), all_reduce(self._chosen.float())
        means = sums[0] / sums[1]  # NaN where nothing is known
        self._share_used = (chosen > 0).float().mean()
        prototypes = torch.special.entr(chosen / chosen.sum()).sum().exp()
        # In the order of Signs, and the first features behind them.
        self._reading = LateReading(torch.cat([means[:6], prototypes[None], means[6:]])), trainer.global_step
        self._begin(device)

    def _judge(self, trainer: Trainer) -> None:
        """Says what has lasted. All ranks read the same numbers, so all stop together."""
        (reading, step), self._reading = self._reading, None
        self._judged += 1
        *numbers, first_std, first_rank = reading.read()
        signs = Signs(*numbers)
        patience = max(3, math.ceil(_PATIENCE * trainer.estimated_stepping_batches / _WINDOW))
        self._first = self._first or {"first_loss": signs.loss, "first_rank": first_rank, "first_std": first_std}
        verdict = diagnose(signs, self._out_dim, **self._first, patch_out_dim=self._patch_out_dim)
        self._lasted = self._lasted + 1 if verdict and verdict.name == self._suspected else 1
        self._suspected = verdict.name if verdict else ""
        if verdict and self._lasted >= patience:
            self._tell(trainer, verdict, self.stop)
        self._stuck = self._stuck + 1 if is_stuck(signs, self._out_dim) else 0
        if self._stuck >= 3 * patience:
            self._tell(trainer, stuck(signs, self._out_dim, step), self.stop)
        for expected_step in [due for due in self.expected_loss if step - _WINDOW < due <= step]:
            self._tell(trainer, off_the_curve(signs.loss, self.expected_loss[expected_step], expected_step))

    def _tell(self, trainer: Trainer, verdict: Verdict | None, stop: bool = False) -> None:
        if verdict is None or verdict.name in self._told:
            return
        self._told.append(verdict.name)
        if trainer.is_global_zero:
            log.warning("step %d: %s%s", trainer.global_step, verdict.text, ". The run stops here" if stop else "")
        for logger in trainer.loggers:
            logger.log_metrics({f"doctor/{verdict.name}": 1.0}, step=trainer.global_step)
        if stop:
            trainer.should_stop = True


def _training_images(trainer: Trainer) -> int | None:
    """Training images, where the loader tells."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None
