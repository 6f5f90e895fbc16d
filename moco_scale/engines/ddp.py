"""torch's DistributedDataParallel, or the bare module when there is one process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_scale.distributed import collectives
from moco_scale.engines.base import (
    MOMENTUM,
    Engine,
    EngineSettings,
    Keep,
    Replicated,
    everything,
    make_sgd,
    plain_step,
    zero_momentum,
)
from moco_scale.methods.moco import MoCo


class DDPEngine(Replicated, Engine):
    """Replicated weights, gradients averaged while backward runs."""

    def __init__(self, moco: MoCo, settings: EngineSettings, device: torch.device) -> None:
        super().__init__(moco, settings, device)
        self._trained = moco.trained_parameters()
        self._optimizer = make_sgd(list(self._trained.values()), settings)
        zero_momentum(self._optimizer)
        self._wrapped: nn.Module = moco
        if collectives.world_size() > 1:
            # A 1x1 convolution's gradient is the same bytes under either of two strides.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            with warnings.catch_warnings():
                # torch 2.14 renames broadcast_buffers; the new name is unknown to 2.11.
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                # Buffers stay local: they are averaged over ranks when needed.
                self._wrapped = DistributedDataParallel(
                    moco,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )

    def _start_micro_batch(self, last: bool) -> None:
        if isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped.require_backward_grad_sync = last

    def _forward(self, *views: Tensor, micro_batch: int, micro_batches: int) -> list[Tensor]:
        return self._wrapped(*views, micro_batch=micro_batch, micro_batches=micro_batches)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained.values() if p.grad is not None]

    def _step(self, learning_rate: float) -> bool:
        return plain_step(
            self, self._optimizer, self._gradients(), learning_rate, collectives.world_size()
        )

    def optimizer_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        state = {f"{n}.{MOMENTUM}": self._optimizer.state[p] for n, p in self._trained.items()}
        return {name: value[MOMENTUM] for name, value in state.items() if keep(name)}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self._trained.items():
            self._optimizer.state[p][MOMENTUM].copy_(state[f"{name}.{MOMENTUM}"])

    def storage(self) -> dict[str, list[Tensor]]:
        query, key = self.moco.parameter_pairs()
        momenta = [self._optimizer.state[p][MOMENTUM] for p in self._trained.values()]
        return {
            "weights": query,
            "key": key,
            "gradients": self._gradients(),
            "optimizer": momenta,
        }
