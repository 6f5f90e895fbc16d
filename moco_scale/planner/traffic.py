"""Traffic of a rank in a step by collective, within its node and across nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from moco_scale.config.schema import Config
from moco_scale.engines.base import PRECISIONS
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import GroupedBatchNorm
from moco_scale.models.registry import NORMS, blocks_of
from moco_scale.planner.memory import FP32, Sharding, flat_partition, share

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
)

_INT64 = 8
_SUMS = 3  # numbers of a query besides the weighted sum of keys


@dataclass(frozen=True)
class Collective:
    """Collective of a step.

    Attributes:
        purpose: what it is for.
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter`` or ``all-to-all``.
        payload: bytes in a step: the output of an all-gather, the input of a reduce-scatter, one
            rank's tensor of the others.
        ranks: participants.
        spread: nodes of these ranks.
        calls: number in a step.
        hidden_by: the pass that it overlaps with: ``query``, ``backward``, ``key``, or "" where
            all wait for it.
    """

    purpose: str
    kind: str
    payload: int
    ranks: int
    spread: int
    calls: int = 1
    hidden_by: str = ""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, by ring algorithms, which no algorithm undercuts."""
        twice = 2 if self.kind == ALL_REDUCE else 1
        return twice * self.payload * (self.ranks - 1) / self.ranks

    @property
    def sent_across(self) -> float:
        """Bytes of these that leave the node, as a mean over the node's ranks."""
        if self.spread == 1:
            return 0.0
        if self.kind == ALL_TO_ALL:
            return self.payload * (1 - 1 / self.spread)
        # A ring through all ranks leaves each node over one link; NCCL runs as many rings as a
        # node has adapters, so its ranks share the traffic.
        return self.sent * self.spread / self.ranks


def traffic(config: Config, moco: MoCo, how: Sharding, gpus: int) -> list[Collective]:
    """List the collectives of a step, without those of logging, checkpoints and evaluations.

    Args:
        config: of the run.
        moco: its model.
        how: sharding of the model.
        gpus: ranks of a node.
    """
    if how.world == 1:
        return []
    found = [*_data(config, how.world, gpus), *_engine(config, moco, how, gpus)]
    found += _spanning(config, moco, how.world, gpus)
    return [c for c in found if c.payload and c.ranks > 1]


def nodes_of(ranks: int, gpus: int) -> int:
    """Number of nodes that hold so many neighbouring ranks."""
    return math.ceil(ranks / gpus)


def _data(config: Config, world: int, gpus: int) -> list[Collective]:
    """List the exchange of crops, and the gathering of keys and queries."""
    contrast, batch = config.contrast, config.optim.batch_size
    views, nodes = (2 if contrast.symmetric else 1), nodes_of(world, gpus)
    crop = 3 * config.data.image_size**2
    per_rank = batch // world
    among = {"world": batch, "node": contrast.shuffle_group, "off": per_rank}
    exchanging = max(among[contrast.shuffle_bn] // per_rank, 1)
    crops = per_rank * crop * views
    keys = FP32 * batch * config.model.dim * views
    found = [
        Collective(
            "ShuffleBN: crops",
            ALL_TO_ALL,
            crops,
            exchanging,
            nodes_of(exchanging, gpus),
            views,
            "query",
        ),
        Collective("keys", ALL_GATHER, keys, world, nodes, views),
    ]
    if config.run.queue == "sharded":
        calls = views * config.run.accumulation_steps
        ids = _INT64 * batch * views if contrast.mask_same_image else 0
        sums = FP32 * batch * (config.model.dim + _SUMS) * views
        found += [
            Collective("queries to all of the queue", ALL_GATHER, keys, world, nodes, calls),
            Collective("their images", ALL_GATHER, ids, world, nodes, calls),
            Collective("sums over the queue", REDUCE_SCATTER, sums, world, nodes, calls),
        ]
    return found


def _engine(config: Config, moco: MoCo, how: Sharding, gpus: int) -> list[Collective]:
    trained = list(moco.trained_parameters().values())
    numbers, world = sum(p.numel() for p in trained), how.world
    micro_batches, nodes = config.run.accumulation_steps, nodes_of(world, gpus)
    if how.engine in ("ddp", "zero0"):
        hidden = "backward" if how.engine == "ddp" else ""
        return [Collective("gradients", ALL_REDUCE, FP32 * numbers, world, nodes, 1, hidden)]
    if how.engine in ("zero1", "zero2"):
        flat = flat_partition(numbers, how) * world
        reductions = micro_batches if how.engine == "zero2" else 1
        calls = reductions * math.ceil(numbers / how.bucket("reduce_bucket_size"))
        hidden = "backward" if how.configuration["zero_optimization"]["overlap_comm"] else ""  # type: ignore[index]
        reduced = FP32 * numbers * reductions
        return [
            Collective("gradients", ALL_REDUCE, reduced, world, nodes, calls, hidden),
            Collective("updated weights", ALL_GATHER, FP32 * flat, world, nodes),
        ]
    return _sharded(config, moco, how, gpus)


def _sharded(config: Config, moco: MoCo, how: Sharding, gpus: int) -> list[Collective]:
    """List those of ZeRO-3 and FSDP: weights gathered for each pass, gradients reduce-scattered."""
    micro_batches, shard = config.run.accumulation_steps, how.shard
    views = 2 if config.contrast.symmetric else 1
    nodes = nodes_of(shard, gpus)
    whole, calls = _gathered_bytes(config, moco.query, how)
    gradients = sum(share(p, how) * shard for p in moco.trained_parameters().values()) * FP32
    units = len(blocks_of(moco.query)) + 1
    found = [
        Collective(
            "query, forward",
            ALL_GATHER,
            whole * micro_batches * views,
            shard,
            nodes,
            calls * micro_batches * views,
            "query",
        ),
        Collective(
            "query, backward",
            ALL_GATHER,
            whole * micro_batches * views,
            shard,
            nodes,
            calls * micro_batches * views,
            "backward",
        ),
        Collective(
            "key, forward",
            ALL_GATHER,
            whole * micro_batches * views,
            shard,
            nodes,
            calls * micro_batches * views,
            "key",
        ),
        Collective(
            "gradients",
            REDUCE_SCATTER,
            gradients * micro_batches,
            shard,
            nodes,
            units * micro_batches,
            "backward",
        ),
    ]
    if how.engine == "zero3":
        found.append(Collective("whether they are finite", ALL_REDUCE, _INT64, shard, nodes))
    if shard < how.world:
        copies = how.world // shard
        found.append(
            Collective(
                "gradients between copies",
                ALL_REDUCE,
                gradients // shard * micro_batches,
                copies,
                copies,
                units,
                "backward",
            )
        )
    return found


def _gathered_bytes(config: Config, encoder: nn.Module, how: Sharding) -> tuple[int, int]:
    """Return the bytes of gathering an encoder once, and the number of messages."""
    blocks = blocks_of(encoder)
    inside = {p: block for block in blocks for p in block.parameters()}
    norms = {
        p
        for block in blocks
        for module in block.modules()
        if isinstance(module, NORMS)
        for p in module.parameters()
    }
    half = (
        how.engine == "fsdp"
        and PRECISIONS[config.run.precision] is not None
        and not config.run.activation_checkpointing
    )
    total = sum(
        share(p, how) * how.shard * (2 if half and p in inside and p not in norms else FP32)
        for p in encoder.parameters()
    )
    return total, len(blocks) + 1 + (1 if half and norms else 0)


def _spanning(config: Config, moco: MoCo, world: int, gpus: int) -> list[Collective]:
    """List the statistics of BatchNorm groups that span ranks."""
    per_rank, size = config.optim.batch_size // world, config.model.bn_group_size
    layers = [m for m in moco.query.modules() if isinstance(m, GroupedBatchNorm)]
    if size <= per_rank or not layers:
        return []
    ranks = size // per_rank
    views = 2 if config.contrast.symmetric else 1
    channels = sum(m.num_features for m in layers)
    forward = 2 * FP32 * channels * ranks * views
    nodes = nodes_of(ranks, gpus)
    calls = len(layers) * views
    return [
        Collective("BatchNorm, forward", ALL_GATHER, 2 * forward, ranks, nodes, 2 * calls),
        Collective("BatchNorm, backward", ALL_REDUCE, forward // ranks, ranks, nodes, calls),
    ]
