"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, Mixed Precision Training, section 3.2).

Gradients of a small loss underflow in fp16. The loss is therefore multiplied by a scale and the
gradients are divided by it; a step whose gradients are not finite is skipped, and the scale is
lowered. The rule is the same under every engine, and its state is two numbers in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_scale.distributed import collectives


@dataclass(frozen=True)
class LossScaling:
    """Settings of a loss scale; the defaults are DeepSpeed's and torch's.

    Attributes:
        initial: scale of the first step.
        window: finite steps in a row after which it doubles.
        minimum: lower bound.
    """

    initial: float = 2.0**16
    window: int = 2000
    minimum: float = 1.0


class LossScale:
    """Loss scale of a run.

    Attributes:
        value: factor of the next loss.
        skipped: steps skipped since the run or its last resume began.
    """

    def __init__(self, settings: LossScaling) -> None:
        self.settings = settings
        self.value = settings.initial
        self.skipped = 0
        self._finite_steps = 0

    def unscale(self, gradients: Sequence[Tensor]) -> bool:
        """Divide gradients by the scale, in place; all ranks call it.

        Args:
            gradients: this rank's own storage, whole or shards.

        Returns:
            Whether the gradients of all ranks are finite; the same on all ranks.
        """
        torch._foreach_mul_(list(gradients), 1.0 / self.value)
        # The largest magnitude is inf or nan when any element is; a sum might overflow by itself.
        zero = torch.zeros((), device=collectives.device())  # a rank may hold no element at all
        largest = torch.stack([zero, *(g.abs().max() for g in gradients if g.numel())])
        bad = (~largest.isfinite().all()).float()
        return collectives.sum_(bad).item() == 0

    def update(self, applied: bool) -> None:
        """Lower the scale after a skipped step, raise it after enough applied ones."""
        if not applied:
            self.value = max(self.value / 2, self.settings.minimum)
            self.skipped += 1
            self._finite_steps = 0
            return
        self._finite_steps += 1
        if self._finite_steps >= self.settings.window:  # more: a resume may shorten it
            self.value *= 2
            self._finite_steps = 0

    def state(self) -> Tensor:
        """Return float64 [2]: the scale, and finite steps since it last changed."""
        return torch.tensor([self.value, self._finite_steps], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restore the values of :meth:`state`."""
        self.value, self._finite_steps = float(state[0]), int(state[1])
