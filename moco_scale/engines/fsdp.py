"""Fully sharded data parallelism: torch's ``fully_shard`` (FSDP2), one unit per residual block.

Each rank keeps 1/W of the weights, gradients, optimizer state and key encoder. A block is gathered
just before it computes and released after. Query and key are sharded alike, so that the moving
average needs no message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco_scale import distributed
from moco_scale.encoders import Encoder
from moco_scale.engines.base import (
    MOMENTUM,
    Engine,
    SGDSettings,
    make_sgd,
    scaled_sgd_step,
    zero_momentum,
)
from moco_scale.moco import MoCo

UNITS = (BasicBlock, Bottleneck)
"""Modules that are gathered and released as a whole."""


class FSDPEngine(Engine):
    """Weights, gradients, optimizer state and key encoder sharded over all ranks."""

    def __init__(
        self, moco: MoCo, optimizer: SGDSettings, precision: str, device: torch.device
    ) -> None:
        super().__init__(moco, precision, device)
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        # Not the module that holds both: of two roots, each forward pass gathers only its own.
        for encoder in (moco.query, moco.key):
            _shard(encoder, mesh)
        self._trained = moco.trained_parameters()
        self._optimizer = make_sgd(list(self._trained.values()), optimizer)
        zero_momentum(self._optimizer)

    def query(self, *views: Tensor) -> list[Tensor]:
        return self.moco(*views)

    def backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def step(self, learning_rate: float) -> bool:
        gradients = [_local(p.grad) for p in self._trained.values() if p.grad is not None]
        return scaled_sgd_step(self._optimizer, gradients, learning_rate, self.loss_scale)

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        query, key = self.moco.parameter_pairs()
        return [_local(w).detach() for w in query], [_local(w) for w in key]

    def model_state(self) -> dict[str, Tensor]:
        return {name: _full(t).cpu() for name, t in self.moco.state_dict().items()}

    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        encoder = fresh().to(self.device)
        encoder.load_state_dict({n: _full(t) for n, t in self.moco.query.state_dict().items()})
        return encoder

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{MOMENTUM}": _full(self._optimizer.state[p][MOMENTUM]).cpu()
            for name, p in self._trained.items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self._trained.items():
            buffer = cast(DTensor, self._optimizer.state[p][MOMENTUM])
            value = state[f"{name}.{MOMENTUM}"].to(self.device)
            # Every rank has read the whole value: each keeps its part, without a message.
            mine = distribute_tensor(
                value, buffer.device_mesh, buffer.placements, src_data_rank=None
            )
            buffer.to_local().copy_(mine.to_local())


def _shard(encoder: nn.Module, mesh: DeviceMesh) -> None:
    # reshard_after_forward also for the root: a forward pass without gradient would otherwise
    # leave it gathered, and the moving average would miss it.
    for module in encoder.modules():
        if isinstance(module, UNITS):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)


def _local(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).to_local()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
