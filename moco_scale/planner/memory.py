"""Memory of a GPU by kind."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import nn

from moco_scale.config.schema import Config
from moco_scale.engines import read_deepspeed
from moco_scale.engines.base import PRECISIONS
from moco_scale.methods.key_queue import DTYPES
from moco_scale.methods.moco import VIEWS, MoCo
from moco_scale.models.encoder import Encoder
from moco_scale.models.registry import blocks_of
from moco_scale.planner.trace import Trace

FP32 = 4
_LOGITS = 1 << 24  # elements of a block of logits on a GPU
_WORKSPACES = (
    3  # a weight's other layouts and its gradient's, while a convolution is differentiated
)


@dataclass(frozen=True)
class Sharding:
    """Distribution of a model over ranks by an engine.

    Attributes:
        engine: ``ddp``, ``fsdp``, ``zero0`` ... ``zero3``.
        world: ranks.
        shard: ranks that share one copy of the sharded tensors.
        configuration: DeepSpeed's, its ``"auto"`` values filled in; else empty.
    """

    engine: str
    world: int
    shard: int
    configuration: dict[str, object]

    def bucket(self, name: str) -> int:
        """Return a number of ``zero_optimization``."""
        section = self.configuration["zero_optimization"]
        assert isinstance(section, dict)
        return int(section[name])


def sharding(config: Config, moco: MoCo, world: int) -> Sharding:
    """Return the sharding of a configuration on ``world`` ranks.

    Raises:
        UserError: The DeepSpeed file contradicts the flags.
    """
    run = config.run
    if run.engine != "deepspeed":
        shard = (run.fsdp_shard_size or world) if run.engine == "fsdp" else 1
        return Sharding(run.engine, world, shard, {})
    parameters = sum(p.numel() for p in moco.trained_parameters().values())
    read = read_deepspeed(config, world, parameters)
    shard = 1 if read.stage == 0 else world
    return Sharding(f"zero{read.stage}", world, shard, read.configuration)


def share(p: nn.Parameter, how: Sharding) -> int:
    """Elements of a parameter on the rank that holds most of it."""
    if how.engine == "fsdp" and p.ndim:  # whole rows
        return math.ceil(p.shape[0] / how.shard) * (p.numel() // p.shape[0])
    if how.engine == "zero3":
        return math.ceil(p.numel() / how.shard)
    return p.numel()


def flat_partition(numbers: int, how: Sharding) -> int:
    """Elements of a rank's partition of ZeRO's flat buffer (stages 1 and 2), aligned for NCCL."""
    align = 2 * how.shard
    return math.ceil(numbers / align) * align // how.shard


def memory(
    config: Config, moco: MoCo, how: Sharding, trace: Trace, *, ahead: bool
) -> dict[str, int]:
    """Estimate the bytes of one rank at the peak of a step.

    Kinds: ``weights``, ``key encoder``, ``optimizer``, ``gradients``, ``gathered`` (weights
    gathered for use, and buffers of collectives), ``queue``, ``inputs`` (crops), ``activations``
    (with the key's crops, which are freed when they are encoded), ``loss`` (a block of logits),
    ``workspaces``.

    Args:
        config: of the run.
        moco: its model.
        how: sharding of the model.
        trace: of a rank's step.
        ahead: the inputs of the next step are made during each step.
    """
    query = list(moco.query.parameters())
    trained = list(moco.trained_parameters().values())
    total = sum(p.numel() for p in query)
    numbers = sum(p.numel() for p in trained)
    engine = how.engine
    own_all, own = (sum(share(p, how) for p in ps) for ps in (query, trained))
    flat = flat_partition(numbers, how)
    momentum, gradients, gathered = numbers, numbers, 0
    activations = trace.peak
    if engine in ("zero1", "zero2"):
        momentum = 2 * flat  # and the partition of weights that it moves
        gathered = how.bucket("reduce_bucket_size")
        gradients = numbers if engine == "zero1" else flat
    elif engine == "zero0":
        gathered = numbers if how.world > 1 else 0  # all gradients, flattened for one message
    elif engine in ("zero3", "fsdp"):
        momentum = 2 * own if engine == "zero3" else own
        gradients = own
        gathered = _gathered(config, moco.query, how, total)
    if engine == "zero1" or how.world == 1:
        # Gradients come as activations go.
        activations = max(trace.peak_with_gradients - FP32 * numbers, 0)
    rows = config.optim.batch_size // how.world // config.run.accumulation_steps
    contrast = config.contrast
    sharded = config.run.queue == "sharded"
    slots = math.ceil(contrast.nce_k / how.world) if sharded else contrast.nce_k
    image = 8 if contrast.mask_same_image else 0
    queries = rows * how.world if sharded else rows
    return {
        "weights": FP32 * own_all,
        "key encoder": FP32 * own_all,
        "optimizer": FP32 * momentum,
        "gradients": FP32 * gradients,
        "gathered": FP32 * gathered,
        "queue": slots * (config.model.dim * DTYPES[contrast.queue_dtype].itemsize + image),
        "inputs": inputs(config, how.world, ahead),
        "activations": activations,
        "loss": FP32 * min(queries * slots, _LOGITS),
        "workspaces": FP32 * _WORKSPACES * max(p.numel() for p in trained),
    }


def inputs(config: Config, world: int, ahead: bool) -> int:
    """Estimate the bytes of a rank's crops, kept by `Inputs`, during the query's backward pass.

    Both views of the rank's whole share in uint8, and the query's current micro-batch in fp32.
    When made ahead: the query's whole share in fp32, and all crops of the next step (uint8, the
    query's and the key's in fp32).
    """
    share, terms = config.optim.batch_size // world, 2 if config.contrast.symmetric else 1
    view = share * 3 * config.data.image_size**2
    if not ahead:
        return VIEWS * view + terms * FP32 * view // config.run.accumulation_steps
    return 2 * VIEWS * view + 3 * terms * FP32 * view


def _gathered(config: Config, encoder: Encoder, how: Sharding, total: int) -> int:
    """Elements (of 4 bytes) of gathered weights at a time."""
    if how.engine == "zero3":
        live = min(total, how.bucket("stage3_max_live_parameters"))
        fetched = min(total, live + how.bucket("stage3_prefetch_bucket_size"))
        # Gradients in a bucket, laid out for the ranks, and this rank's shard of the result.
        bucket = min(total, how.bucket("reduce_bucket_size"))
        return fetched + 2 * bucket + bucket // how.world
    units = [sum(p.numel() for p in block.parameters()) for block in blocks_of(encoder)]
    half = PRECISIONS[config.run.precision] is not None and not config.run.activation_checkpointing
    # Weights outside blocks stay gathered from forward to backward; of blocks, two at a time.
    pairs = [a + b for a, b in itertools.pairwise(units)]
    return total - sum(units) + max(pairs, default=sum(units)) // (2 if half else 1)
