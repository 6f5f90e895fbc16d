"""What the training loop knows of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moco_scale.encoders import Encoder
from moco_scale.loss_scale import LossScale, LossScaling
from moco_scale.moco import MoCo, momentum_update

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class SGDSettings:
    """Hyper-parameters of the optimizer that do not change during a run."""

    momentum: float
    weight_decay: float


class Engine(ABC):
    """Wraps a :class:`MoCo` for one way of training it on all ranks.

    The initial or resumed weights are already in the module when an engine is made. Gradients
    are averaged over the ranks. Weights and key encoder are stored in fp32; ``precision`` only
    decides what the encoders compute in, and with fp16 the loss is scaled.

    Attributes:
        moco: the module itself; where an engine shards, its parameters are shards.
        device: where it lies.
        loss_scale: with fp16, else None.
    """

    def __init__(
        self,
        moco: MoCo,
        precision: str,
        device: torch.device,
        scaling: LossScaling | None = None,
    ) -> None:
        self.moco, self.device = moco, device
        moco.compute_dtype = PRECISIONS[precision]
        self.loss_scale = LossScale(scaling or LossScaling()) if precision == "fp16" else None

    @abstractmethod
    def query(self, *views: Tensor) -> list[Tensor]:
        """Queries of each view, differentiable: fp32 unit rows [B, dim]."""

    def key(self, view: Tensor) -> Tensor:
        """Keys of a view, without gradient: fp32 unit rows [B, dim]."""
        return self.moco.keys(view)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, this rank's mean over its samples."""

    @abstractmethod
    def step(self, learning_rate: float) -> bool:
        """One optimizer step, and gradients cleared. False: it was skipped, nothing moved."""

    def ema(self, momentum: float) -> None:
        """Move the key encoder towards the query: fp32, this rank's own storage, no messages."""
        query, key = self._local_pairs()
        momentum_update(key, query, momentum)

    @abstractmethod
    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's own storage of the query's parameters and, in the same order, the key's."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Full fp32 state of both encoders on every rank, by name in MoCo; all ranks call it."""

    @abstractmethod
    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        """The query encoder, whole, for evaluation on each rank alone; all ranks call it.

        fresh: makes an encoder of the same shape, which is filled where the own one is sharded.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Full fp32 optimizer state on every rank, as ``PARAMETER.STATE``; all ranks call it."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`optimizer_state` of any engine gave."""


class Replicated:
    """Mixin of engines under which every rank holds both encoders whole."""

    moco: MoCo
    _pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._pairs is None:  # once: the tensors stay the same objects for the whole run
            query, key = self.moco.parameter_pairs()
            self._pairs = [w.detach() for w in query], key
        return self._pairs

    def model_state(self) -> dict[str, Tensor]:
        return self.moco.state_dict()

    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        return self.moco.query


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


def scaled_sgd_step(
    optimizer: torch.optim.Optimizer,
    gradients: list[Tensor],
    learning_rate: float,
    loss_scale: LossScale | None,
) -> bool:
    """Step and clear an optimizer; False: left out, because scaled gradients were not finite.

    gradients: this rank's own storage of them.
    """
    applied = loss_scale is None or loss_scale.unscale(gradients)
    if applied:
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if loss_scale is not None:
        loss_scale.update(applied)
    return applied
