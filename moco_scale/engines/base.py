"""What the training loop knows of an engine."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moco_scale.moco import MoCo, momentum_update

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SGDSettings:
    """Hyper-parameters of the optimizer that do not change during a run."""

    momentum: float
    weight_decay: float


class Engine(ABC):
    """Wraps a :class:`MoCo` for one way of training it on all ranks.

    The initial or resumed weights are already in the module when an engine is made. Gradients
    are averaged over the ranks. Weights and key encoder are stored in fp32; ``precision`` only
    decides what the encoders compute in.

    Attributes:
        moco: the module itself, unwrapped.
        device: where it lies.
    """

    def __init__(self, moco: MoCo, precision: str, device: torch.device) -> None:
        self.moco, self.device = moco, device
        self.compute_dtype = PRECISIONS[precision]
        # Built once: the tensors stay the same objects for the whole run.
        self._query_weights, self._key_weights = moco.parameter_pairs()

    @abstractmethod
    def query(self, *views: Tensor) -> list[Tensor]:
        """Queries of each view, differentiable: fp32 unit rows [B, dim]."""

    def key(self, view: Tensor) -> Tensor:
        """Keys of a view, without gradient: fp32 unit rows [B, dim]."""
        with self.autocast():
            return self.moco.keys(view)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, this rank's mean over its samples."""

    @abstractmethod
    def step(self, learning_rate: float) -> bool:
        """One optimizer step, and gradients cleared. False: it was skipped, nothing moved."""

    def ema(self, momentum: float) -> None:
        """Move the key encoder towards the query: fp32, this rank's own storage, no messages."""
        momentum_update(self._key_weights, [w.detach() for w in self._query_weights], momentum)

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Full fp32 optimizer state on every rank, as ``PARAMETER.STATE``; all ranks call it."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`optimizer_state` of any engine gave."""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the encoders compute."""
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


MOMENTUM = "momentum_buffer"


def make_sgd(parameters: list[nn.Parameter], settings: SGDSettings) -> torch.optim.SGD:
    """torch's SGD; its learning rate is set before every step."""
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a zero momentum buffer, as if it had always been there.

    The first step then makes the same buffer as without, and a state exists to be saved or
    loaded at any time.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p][MOMENTUM] = torch.zeros_like(p)
