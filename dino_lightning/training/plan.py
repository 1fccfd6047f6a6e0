"""The plan of a run: how many steps it has, and the value of every schedule at each."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import yaml
from lightning.pytorch import Trainer

from dino_lightning.training.schedules import cosine_schedule

log = logging.getLogger(__name__)

WARMUPS = {"warmup_epochs", "warmup_teacher_temp_epochs"}  # options in epochs, as far as a method has them


class Unsaid(int):
    """The default length of a warm-up, in epochs: one that nobody asked for is shortened in a short run, another one refused."""


yaml.SafeDumper.add_representer(Unsaid, yaml.SafeDumper.represent_int)  # a number like others in configurations


@dataclass(frozen=True)
class Plan:
    """Schedules as functions of the global step (0-based). An epoch is ``steps_per_epoch`` optimizer steps.

    ``lr`` is the learning rate as applied, after the scaling rule. A method adds the schedules that it has beyond these.
    """

    total_steps: int
    steps_per_epoch: int
    lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    weight_decay_end: float

    @classmethod
    def of(cls, options: Mapping[str, Any], total_steps: int, steps_per_epoch: int, lr: float) -> Self:
        """The plan of a run of this length, with what else a method's options say."""
        known = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "lr": lr}
        rest = {field.name: options[field.name] for field in fields(cls) if field.name not in known}
        for name in WARMUPS & rest.keys():
            rest[name] = _fitted(name, rest[name], steps_per_epoch, total_steps)
        return cls(**known, **rest)

    def epoch(self, step: int) -> int:
        """The epoch of a step, from 0."""
        return step // self.steps_per_epoch

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, rounded."""
        return round(epochs * self.steps_per_epoch)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, as it is applied."""
        return cosine_schedule(
            step,
            base_value=self.lr,
            final_value=self.min_lr,
            total_steps=self.total_steps,
            warmup_steps=self.steps(self.warmup_epochs),
        )

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of a step."""
        return cosine_schedule(step, base_value=self.weight_decay, final_value=self.weight_decay_end, total_steps=self.total_steps)

    def values_at(self, step: int) -> dict[str, float]:
        """All of its schedules, by their names in the log."""
        return {"lr": self.lr_at(step), "weight_decay": self.weight_decay_at(step)}


@dataclass(frozen=True)
class MomentumPlan(Plan):
    """With a teacher that follows its student ever more slowly."""

    momentum_teacher: float

    def momentum_at(self, step: int) -> float:
        """Share of the teacher's old weights that a step keeps."""
        return cosine_schedule(step, base_value=self.momentum_teacher, final_value=1.0, total_steps=self.total_steps)

    def values_at(self, step: int) -> dict[str, float]:
        return super().values_at(step) | {"momentum": self.momentum_at(step)}


def check_epochs(trainer: Trainer, options: Mapping[str, Any]) -> None:
    """Refuses warm-ups that are longer than the run as soon as that is known: raises ValueError, naming option and numbers."""
    if trainer.max_epochs and trainer.max_epochs > 0 and trainer.max_steps == -1 and not trainer.fast_dev_run:
        for name, epochs in _warmups(options).items():
            if epochs > trainer.max_epochs:
                raise ValueError(
                    f"{name}={epochs} is longer than the run of max_epochs={trainer.max_epochs}; shorten it (--model.{name}) or train longer"
                )


def check_length(trainer: Trainer, options: Mapping[str, Any]) -> None:
    """Refuses a run without a length, and warm-ups that are longer than the run; only ``fast_dev_run`` clamps those.

    It makes the training loader, and with it fixes the place in the epoch: not before a resumed run knows its own.

    Raises:
        ValueError: naming the option and both numbers.
    """
    total_steps, steps_per_epoch = count_steps(trainer)
    for name, epochs in _warmups(options).items():
        steps = epochs * steps_per_epoch
        if steps > total_steps and not trainer.fast_dev_run:
            raise ValueError(
                f"{name}={epochs} is {steps} steps, but the run has only {total_steps} "
                f"({total_steps / steps_per_epoch:g} epochs of {steps_per_epoch}); shorten the warm-up or train longer"
            )


def _warmups(options: Mapping[str, Any]) -> dict[str, int]:
    """The warm-ups that somebody asked for."""
    names = sorted((WARMUPS | {"freeze_backbone_epochs"}) & options.keys())
    return {name: options[name] for name in names if not isinstance(options[name], Unsaid)}


def _fitted(name: str, epochs: int, steps_per_epoch: int, total_steps: int) -> float:
    """Epochs of a warm-up: one that nobody asked for becomes a tenth of the run if it would take more than half of it."""
    run = total_steps / steps_per_epoch
    if 2 * epochs > run and isinstance(epochs, Unsaid):
        steps = total_steps // 10
        log.info("%s: the default of %d is more than half of the run; a tenth of it, %d steps", name, epochs, steps)
        return steps / steps_per_epoch
    return min(epochs, run)  # check_length refused longer ones, except in a fast_dev_run


def count_steps(trainer: Trainer) -> tuple[int, int]:
    """(optimizer steps of the run, optimizer steps of an epoch)."""
    trainer.fit_loop.setup_data()  # makes the training loader, whose length is known from then on
    total = trainer.estimated_stepping_batches
    if math.isinf(trainer.num_training_batches):
        raise ValueError(
            "the training loader has no length, so an epoch has none; set Trainer(limit_train_batches=N), "
            "which defines the epoch as N batches"
        )
    if math.isinf(total) or total < 1:
        raise ValueError(
            "the schedules need the length of the run; set Trainer(max_epochs=...) or Trainer(max_steps=...), "
            f"got max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
        )
    return int(total), math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def images_per_step(trainer: Trainer, first_batch_size: int | None = None) -> int:
    """Images of an optimizer step: of a batch × devices × accumulated batches.

    Args:
        trainer: of the running fit, with its training loader.
        first_batch_size: counts where the loader does not tell its batch size.

    Raises:
        ValueError: if neither tells.
    """
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    size = size or first_batch_size
    if size is None:
        raise ValueError(
            "the learning rate is scaled by the images of a step, but the training loader does not tell its batch size; "
            "give it an attribute batch_size"
        )
    return size * trainer.world_size * trainer.accumulate_grad_batches
