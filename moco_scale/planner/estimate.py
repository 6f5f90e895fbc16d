"""Time of a step on given hardware."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moco_scale.config.schema import Config
from moco_scale.planner.cluster import GB, Hardware
from moco_scale.planner.memory import FP32, Sharding
from moco_scale.planner.trace import Kernel, Trace
from moco_scale.planner.traffic import ALL_REDUCE, ALL_TO_ALL, Collective

MEAN_IMAGE_BYTES = 110e3  # of ImageNet's JPEGs
# Shares of a message's latency across the network: of one inside a node, of starting one.
_INSIDE, _START = 0.2, 0.05
_AUGMENT_PASSES = 40  # reads and writes of a crop in fp32 by v2's augmentations


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by kind.

    Attributes:
        compute: passes through both encoders, each kernel limited by arithmetic or memory.
        loss: InfoNCE over the queue.
        update: optimizer, moving average and checks: passes over this rank's weights.
        augment: colours and blur.
        network: all collectives, hidden or not.
        exposed: of these, those that the step waits for.
    """

    compute: float
    loss: float
    update: float
    augment: float
    network: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.loss + self.update + self.augment + self.exposed


def kernels_time(kernels: Iterable[Kernel], hardware: Hardware) -> float:
    """Sum kernels' seconds, each the largest of its arithmetic, its bytes and a launch."""
    bandwidth = hardware.memory_gbs * GB * hardware.memory_share
    full, half = (
        peak * 1e12 * hardware.compute_share
        for peak in (hardware.tflops_fp32, hardware.tflops_half)
    )
    launch = hardware.kernel_us * 1e-6
    return sum(
        k.times * max(k.flops / (half if k.half else full), k.moved / bandwidth, launch)
        for k in kernels
    )


def collective_time(collective: Collective, hardware: Hardware) -> float:
    """Return seconds of a collective in a step: the slower of the two networks, plus latency."""
    inside = (collective.sent - collective.sent_across) / (hardware.node_gbs * GB)
    across = collective.sent_across / (hardware.network_gbs * GB)
    latency = collective.calls * _hops(collective) * hardware.latency_us * 1e-6
    return max(inside, across) / hardware.network_share + latency


def _hops(collective: Collective) -> float:
    """Count the messages that follow one another across the network in a collective.

    NCCL reduces along a tree and gathers along a ring through all ranks; the messages of an
    all-to-all go at once and cost only their start.
    """
    ranks, nodes = collective.ranks, collective.spread
    if collective.kind == ALL_REDUCE:
        return 2 * math.log2(ranks)
    if collective.kind == ALL_TO_ALL:
        return _START * (ranks - 1)
    return nodes - 1 + _INSIDE * (ranks - nodes)


def step_time(
    config: Config,
    how: Sharding,
    trace: Trace,
    collectives: list[Collective],
    owned_bytes: int,
    hardware: Hardware,
) -> StepTime:
    """Estimate the time of one step of one rank.

    Args:
        config: of the run.
        how: sharding of the model.
        trace: of a rank's step.
        collectives: of a step.
        owned_bytes: of this rank's weights of the query.
        hardware: of the run.
    """
    phases = {
        name: kernels_time(kernels, hardware)
        for name, kernels in (
            ("query", trace.query),
            ("key", trace.key),
            ("backward", trace.backward),
        )
    }
    exposed = network = 0.0
    for name in ("", *phases):
        seconds = sum(collective_time(c, hardware) for c in collectives if c.hidden_by == name)
        network += seconds
        exposed += max(seconds - phases.get(name, 0.0), 0.0)
    bandwidth = hardware.memory_gbs * GB * hardware.memory_share
    contrast, rows = config.contrast, config.optim.batch_size // how.world
    terms = 2 if contrast.symmetric else 1
    products = 4 * rows * contrast.nce_k * config.model.dim * terms  # logits, weighted keys
    logits = 4 * FP32 * rows * contrast.nce_k * terms  # written, exponentiated, read twice
    loss = max(
        products / (hardware.tflops_fp32 * 1e12 * hardware.compute_share), logits / bandwidth
    )
    crops = 2 * rows * 3 * config.data.image_size**2 * FP32
    return StepTime(
        compute=sum(phases.values()),
        loss=loss,
        # SGD reads weight, gradient, momentum and writes two; the average reads two, writes one.
        update=9 * owned_bytes / bandwidth,
        augment=_AUGMENT_PASSES * crops / bandwidth,
        network=network,
        exposed=exposed,
    )
