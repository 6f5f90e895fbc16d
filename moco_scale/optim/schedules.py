"""Learning-rate schedules: pure functions of the step, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCHEDULES = ("step", "cosine", "cosine-epoch", "cosine-epoch-end")


def learning_rate(
    step: int,
    *,
    base: float,
    scheduler: str,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float = 0,
    warmup_multiplier: float = 100,
    minimum: float = 0.0,
    decay_epochs: Sequence[int] = (),
    decay_rate: float = 0.1,
) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        step: number of steps taken before this one.
        base: learning rate after the warm-up, already scaled to the batch.
        scheduler: ``"step"`` multiplies by ``decay_rate`` at the start of each of
            ``decay_epochs``; ``"cosine"`` falls at each step; ``"cosine-epoch"`` falls at the
            start of each epoch (official MoCo v2), ``"cosine-epoch-end"`` is one epoch ahead of
            ``cosine-epoch`` (official CIFAR-10 demo, whose last epoch runs at 0).
        steps_per_epoch: optimizer steps of an epoch.
        epochs: of the whole run.
        warmup_epochs: linear warm-up from ``base / warmup_multiplier``; the cosine begins after.
        warmup_multiplier: see there.
        minimum: where the cosine ends.
        decay_epochs: see ``scheduler``.
        decay_rate: see ``scheduler``.

    Raises:
        ValueError: The scheduler is unknown.
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        first = base / warmup_multiplier
        return first + (base - first) * step / warmup_steps
    if scheduler == "step":
        epoch = step // steps_per_epoch
        return base * decay_rate ** sum(epoch >= e for e in decay_epochs)
    after, total = step - warmup_steps, max(epochs * steps_per_epoch - warmup_steps, 1)
    if scheduler == "cosine":
        progress = after / total
    elif scheduler in ("cosine-epoch", "cosine-epoch-end"):
        whole_epochs = after // steps_per_epoch + (scheduler == "cosine-epoch-end")
        progress = whole_epochs * steps_per_epoch / total
    else:
        raise ValueError(f"unknown learning-rate scheduler {scheduler}")
    return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
