"""torch's DistributedDataParallel, or the bare module when there is one process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_scale import distributed
from moco_scale.engines.base import (
    MOMENTUM,
    Engine,
    Replicated,
    SGDSettings,
    make_sgd,
    scaled_sgd_step,
    zero_momentum,
)
from moco_scale.moco import MoCo


class DDPEngine(Replicated, Engine):
    """Replicated weights, gradients averaged while backward runs."""

    def __init__(
        self, moco: MoCo, optimizer: SGDSettings, precision: str, device: torch.device
    ) -> None:
        super().__init__(moco, precision, device)
        self._trained = moco.trained_parameters()
        self._optimizer = make_sgd(list(self._trained.values()), optimizer)
        zero_momentum(self._optimizer)
        self._wrapped: nn.Module = moco
        if distributed.world_size() > 1:
            # A 1x1 convolution's gradient is the same bytes under either of two strides.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            with warnings.catch_warnings():
                # torch 2.14 renames broadcast_buffers; the new name is unknown to 2.11.
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                # Buffers stay local: the mean over ranks is taken when somebody needs them.
                self._wrapped = DistributedDataParallel(
                    moco,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )

    def query(self, *views: Tensor) -> list[Tensor]:
        return self._wrapped(*views)

    def backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def step(self, learning_rate: float) -> bool:
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        return scaled_sgd_step(self._optimizer, gradients, learning_rate, self.loss_scale)

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{MOMENTUM}": self._optimizer.state[p][MOMENTUM]
            for name, p in self._trained.items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self._trained.items():
            self._optimizer.state[p][MOMENTUM].copy_(state[f"{name}.{MOMENTUM}"])
