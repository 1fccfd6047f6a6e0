"""The plan of a run: how many steps it has, and the value of every schedule at each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from dino_lightning.schedules import cosine_schedule, linear_warmup

_TAKEN_OVER = (
    "min_lr",
    "weight_decay",
    "weight_decay_end",
    "momentum_teacher",
    "warmup_teacher_temp",
    "teacher_temp",
    "warmup_teacher_temp_epochs",
)


@dataclass(frozen=True)
class Plan:
    """Schedules as functions of the global step (0-based). An epoch is ``steps_per_epoch`` optimizer steps.

    ``lr`` is the learning rate as applied, after the linear scaling rule.
    """

    total_steps: int
    steps_per_epoch: int
    images_per_step: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float
    weight_decay_end: float
    momentum_teacher: float
    warmup_teacher_temp: float
    teacher_temp: float
    warmup_teacher_temp_epochs: int

    @classmethod
    def of(cls, trainer: Trainer, options: Mapping[str, Any], first_batch_size: int) -> "Plan":
        """The plan of the running fit. ``first_batch_size`` counts where the loader does not tell its batch size."""
        total_steps, steps_per_epoch = count_steps(trainer)
        images = count_images(trainer, first_batch_size)
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            images_per_step=images,
            lr=options["lr"] * images / 256,
            # check_length refused longer ones, except in a fast_dev_run.
            warmup_steps=min(options["warmup_epochs"] * steps_per_epoch, total_steps),
            **{name: options[name] for name in _TAKEN_OVER},
        )

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        return cosine_schedule(
            step,
            base_value=self.lr,
            final_value=self.min_lr,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
        )

    def weight_decay_at(self, step: int) -> float:
        return cosine_schedule(
            step, base_value=self.weight_decay, final_value=self.weight_decay_end, total_steps=self.total_steps
        )

    def momentum_at(self, step: int) -> float:
        return cosine_schedule(step, base_value=self.momentum_teacher, final_value=1.0, total_steps=self.total_steps)

    def teacher_temp_at(self, step: int) -> float:
        return linear_warmup(
            self.epoch(step),
            start_value=self.warmup_teacher_temp,
            final_value=self.teacher_temp,
            warmup_epochs=self.warmup_teacher_temp_epochs,
        )


def check_length(trainer: Trainer, options: Mapping[str, Any]) -> None:
    """Refuses a run without a length, and warm-ups that are longer than the run; only ``fast_dev_run`` clamps those.

    Raises:
        ValueError: naming the option and both numbers.
    """
    total_steps, steps_per_epoch = count_steps(trainer)
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        steps = options[name] * steps_per_epoch
        if steps > total_steps and not trainer.fast_dev_run:
            raise ValueError(
                f"{name}={options[name]} is {steps} steps, but the run has only {total_steps} "
                f"({total_steps / steps_per_epoch:g} epochs of {steps_per_epoch}); shorten the warm-up or train longer"
            )


def count_steps(trainer: Trainer) -> tuple[int, int]:
    """(optimizer steps of the run, optimizer steps of an epoch)."""
    if math.isinf(trainer.num_training_batches):
        raise ValueError(
            "the training loader has no length, so an epoch has none; set Trainer(limit_train_batches=N), "
            "which defines the epoch as N batches"
        )
    total = trainer.estimated_stepping_batches
    if math.isinf(total) or total < 1:
        raise ValueError(
            "the schedules need the length of the run; set Trainer(max_epochs=...) or Trainer(max_steps=...), "
            f"got max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
        )
    return int(total), math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def count_images(trainer: Trainer, first_batch_size: int | None = None) -> int:
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
