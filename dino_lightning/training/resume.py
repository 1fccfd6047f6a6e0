"""Runs that go on: from within an epoch, on other devices, with other micro-batches."""

import logging
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dino_lightning.training.checkpoint_io import sweep
from dino_lightning.training.plan import Plan

log = logging.getLogger(__name__)


def layout(trainer: Trainer, plan: Plan, images_per_step: int) -> dict[str, int]:
    """How a run deals out its images, kept in its checkpoints."""
    return {
        "images_per_step": images_per_step,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.total_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "world_size": trainer.world_size,
    }


def accumulated_batches(trainer: Trainer) -> int:
    """Batches of a step. A GradientAccumulationScheduler tells the Trainer when an epoch begins: too late for a run that goes on in one."""
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return schedulers[0].get_accumulate_grad_batches(0) if schedulers else trainer.accumulate_grad_batches


def mend_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Mends the place in the epoch at which a checkpoint lets a run go on, before Lightning reads it.

    Lightning closes an epoch that max_time, max_steps or should_stop ended before it saves, and a resumed run would go on in
    the middle of the next one. And it counts batches: where a step is another number of them, the same step is another batch.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]["current"]
    if batches["is_last_batch"] and epochs["processed"] < epochs["ready"] and not _is_validating(loop):
        # Of the last step of an epoch, before Lightning closed it: resumed so, it would count the next epoch as the same.
        for count in loop["epoch_progress"].values():
            count["processed"] = count["ready"]
        for kind in ("current", "total"):
            batches[kind]["completed"] = batches[kind]["processed"]
    if not batches["is_last_batch"] and batches["current"]["processed"] and epochs["processed"] == epochs["ready"]:
        epochs["processed"] -= 1
        epochs["completed"] = min(epochs["completed"], epochs["processed"])
    now = accumulated_batches(trainer)
    before = checkpoint.get("layout", {}).get("accumulate_grad_batches", now)
    processed = batches["current"]["processed"]
    further = processed * now // before - processed
    for name in batches["current"]:  # "completed" is one behind in a checkpoint of a step
        batches["current"][name] += further


def validate_again(checkpoint: dict[str, Any]) -> None:
    """Has a run that is resumed from a checkpoint of the middle of a validation begin with that validation, as a whole."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["is_last_batch"] = False
    for kind in ("current", "total"):
        progress[kind] = dict.fromkeys(progress[kind], 0)
    progress["total"]["ready"] = progress["total"]["started"] = 1  # begun and not over


def _is_validating(loop: dict[str, Any]) -> bool:
    total = loop.get("epoch_loop.val_loop.batch_progress", {}).get("total")  # a checkpoint that was adopted has none
    return total is not None and total["started"] == total["ready"] == total["processed"] + 1


def warn_of_changes(before: dict[str, int], now: dict[str, int]) -> None:
    """Warns of what differs from the run whose checkpoint is resumed."""
    length = before.get("total_steps", now["total_steps"])  # a checkpoint that was adopted does not tell
    if length != now["total_steps"]:
        log.warning(
            "resumed for %d steps in all; before, there were %d: learning rate, weight decay and momentum of the teacher go on at the "
            "same step of schedules over %d; to end as planned, keep max_epochs and max_steps",
            *(now["total_steps"], length, now["total_steps"]),
        )
    before = before | {"total_steps": now["total_steps"]}
    if before["images_per_step"] != now["images_per_step"] or before["steps_per_epoch"] != now["steps_per_epoch"]:
        log.warning(
            "resumed with %d images a step and %d steps an epoch; before, there were %d and %d: the schedules go on at the same "
            "step of another plan, the learning rate is scaled by the images of a step, and within an epoch images may come "
            "twice or not at all. To go on with the same plan, keep batch size × devices × accumulated batches",
            *(now["images_per_step"], now["steps_per_epoch"], before["images_per_step"], before["steps_per_epoch"]),
        )
    elif before != now:
        log.warning(
            "resumed on %d device(s) with %d accumulated batches; before, there were %d and %d: the same images a step, the same "
            "schedules; sums are rounded in another order and drop path is drawn anew, so the end is not bit-equal",
            *(now["world_size"], now["accumulate_grad_batches"], before["world_size"], before["accumulate_grad_batches"]),
        )


def sweep_partial_checkpoints(trainer: Trainer) -> None:
    """What killed processes left of checkpoints in the folders that this run writes to."""
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder and "://" not in str(folder):
            sweep(folder)


def remember_saved_step(trainer: Trainer) -> None:
    """Tells each ModelCheckpoint that this step is saved; a resumed one has forgotten it and would save again in the middle of a step."""
    if trainer.global_step and not trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation:  # whose end is saved
        for callback in trainer.checkpoint_callbacks:
            callback._last_global_step_saved = trainer.global_step


def count_logged_steps(trainer: Trainer) -> None:
    """Lightning's count of the loggers' steps is one off after some resumes: of an epoch's last step, of a validation."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
