"""Fully sharded data parallelism: torch's ``fully_shard`` (FSDP2), one unit per block.

Each rank keeps 1/W of the weights, gradients, optimizer state and key encoder. A block is gathered
just before it computes and released after. Query and key are sharded the same way, so that the
moving average needs no message.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moco_scale.config.resolve import check_shard_size
from moco_scale.distributed import collectives
from moco_scale.engines.base import (
    MOMENTUM,
    PRECISIONS,
    Engine,
    EngineSettings,
    Keep,
    everything,
    make_sgd,
    plain_step,
    zero_momentum,
)
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import Encoder
from moco_scale.models.registry import NORMS, blocks_of


class FSDPEngine(Engine):
    """Weights, gradients, optimizer state and key encoder sharded over the ranks.

    With ``shard_size`` they are sharded over so many neighbouring ranks, such as a node's, and
    gradients are averaged between these groups: less traffic across nodes, more memory.

    Raises:
        UserError: ``shard_size`` does not divide the number of ranks.
    """

    def __init__(self, moco: MoCo, settings: EngineSettings, device: torch.device) -> None:
        super().__init__(moco, settings, device)
        mesh = _mesh(device, settings.shard_size)
        self._copies = mesh.size(0) if mesh.ndim == 2 else 1
        self.own_groups = mesh.ndim == 2
        # Not the module that holds both: of two roots, each forward pass gathers only its own.
        for encoder in (moco.query, moco.key):
            # Activation checkpointing would enter the normalisation layers' own unit twice.
            gathered = None if settings.activation_checkpointing else PRECISIONS[settings.precision]
            _shard(encoder, mesh, gathered)
        self._trained = moco.trained_parameters()
        self._optimizer = make_sgd(list(self._trained.values()), settings)
        zero_momentum(self._optimizer)

    def _forward(self, *views: Tensor, micro_batch: int, micro_batches: int) -> list[Tensor]:
        return self.moco(*views, micro_batch=micro_batch, micro_batches=micro_batches)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def _gradients(self) -> list[Tensor]:
        return [_local(p.grad) for p in self._trained.values() if p.grad is not None]

    def _step(self, learning_rate: float) -> bool:
        gradients = self._gradients()
        return plain_step(self, self._optimizer, gradients, learning_rate, self._copies)

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        query, key = self.moco.parameter_pairs()
        return [_local(w).detach() for w in query], [_local(w) for w in key]

    def model_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        return _gathered(self.moco.state_dict(), keep)

    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        encoder = fresh().to(self.device)
        encoder.load_state_dict({n: _full(t) for n, t in self.moco.query.state_dict().items()})
        return encoder

    def optimizer_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        state = self._optimizer.state
        return _gathered(
            {f"{n}.{MOMENTUM}": state[p][MOMENTUM] for n, p in self._trained.items()}, keep
        )

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self._trained.items():
            buffer = cast(DTensor, self._optimizer.state[p][MOMENTUM])
            value = state[f"{name}.{MOMENTUM}"].to(self.device)
            # Every rank has read the whole value: each keeps its shard, without a message.
            mine = distribute_tensor(
                value, buffer.device_mesh, buffer.placements, src_data_rank=None
            )
            buffer.to_local().copy_(mine.to_local())

    def storage(self) -> dict[str, list[Tensor]]:
        query, key = self._local_pairs()
        momenta = [_local(self._optimizer.state[p][MOMENTUM]) for p in self._trained.values()]
        gradients = self._gradients()
        return {"weights": query, "key": key, "gradients": gradients, "optimizer": momenta}


def _mesh(device: torch.device, shard_size: int) -> DeviceMesh:
    world = collectives.world_size()
    if not shard_size or shard_size == world:
        return init_device_mesh(device.type, (world,))
    check_shard_size(shard_size, world)
    shape, names = (world // shard_size, shard_size), ("replicate", "shard")
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def _shard(encoder: nn.Module, mesh: DeviceMesh, gathered: torch.dtype | None) -> None:
    # reshard_after_forward also for the root: a forward pass without gradient would otherwise
    # leave it gathered, and the moving average would not reach the shards.
    blocks = blocks_of(encoder)
    policy = MixedPrecisionPolicy()
    if gathered is not None:
        # What autocast would round after gathering is rounded before: half the traffic. Sums of
        # gradients stay fp32. So do normalisation, whose few weights are a unit of their own and
        # gathered together, and the rest of the encoder, where a transformer's positions would
        # lower the precision of all that is added to them.
        policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        norms: list[nn.Module] = [
            module for block in blocks for module in block.modules() if isinstance(module, NORMS)
        ]
        if norms:
            fully_shard(norms, mesh=mesh, reshard_after_forward=True)
    for module in blocks:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)
    # The next block is gathered while one computes, without waiting for the CPU to get there.
    for block, following in itertools.pairwise(cast(list[FSDPModule], blocks)):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def _local(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).to_local()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(state: Mapping[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        whole = _full(tensor)
        if keep(name):
            result[name] = whole.cpu()
    return result
