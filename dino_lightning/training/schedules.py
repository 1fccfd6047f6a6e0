"""Schedules of DINO as pure functions of the step or the epoch, so that there is nothing to save and nothing to restore.

The values are those of the reference implementation, to float64 rounding: learning rate (linear warm-up, then cosine),
weight decay and teacher momentum (cosine), teacher temperature (linear warm-up per epoch). Paper: Caron et al. 2021,
section 3.1 and appendix A.
"""

import math


def cosine_schedule(
    step: int,
    *,
    base_value: float,
    final_value: float,
    total_steps: int,
    warmup_steps: int = 0,
    start_value: float = 0.0,
) -> float:
    """Value at ``step`` (0-based) of a linear warm-up followed by half a cosine from ``base_value`` to ``final_value``.

    The warm-up includes both its ends: step 0 has exactly ``start_value``, step ``warmup_steps - 1`` exactly ``base_value``,
    which the first cosine step repeats. The cosine would reach ``final_value`` at ``total_steps``, one after the last step;
    later steps stay there.

    Raises:
        ValueError: if the warm-up is longer than the run, or ``step`` is negative.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if warmup_steps > total_steps:
        raise ValueError(f"the warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps")
    if step < warmup_steps:
        return linear_warmup(step, start_value=start_value, final_value=base_value, warmup_epochs=warmup_steps)
    if step >= total_steps:
        return final_value
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_value + 0.5 * (base_value - final_value) * (1 + math.cos(math.pi * progress))


def linear_warmup(epoch: int, *, start_value: float, final_value: float, warmup_epochs: int) -> float:
    """Value at ``epoch`` (0-based) of a line that reaches ``final_value`` in the last of ``warmup_epochs`` and stays there.

    With 30 warm-up epochs, epoch 29 already has ``final_value``. A warm-up of one epoch has ``start_value`` in epoch 0.

    Raises:
        ValueError: if ``epoch`` is negative.
    """
    if epoch < 0:
        raise ValueError(f"epoch must not be negative, got {epoch}")
    if epoch >= warmup_epochs:
        return final_value
    if warmup_epochs == 1:
        return start_value
    return start_value + (final_value - start_value) * epoch / (warmup_epochs - 1)
