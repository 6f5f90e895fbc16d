"""How a model is wrapped, stepped and saved; nothing outside knows DeepSpeed or DDP."""

from __future__ import annotations

import dataclasses

import torch

from moco_scale import distributed
from moco_scale.batchnorm import spans_ranks
from moco_scale.config import Config
from moco_scale.deepspeed_config import read_configuration
from moco_scale.engines.base import Engine, EngineSettings
from moco_scale.moco import MoCo

__all__ = ["Engine", "EngineSettings", "make_engine"]


def make_engine(config: Config, moco: MoCo, device: torch.device) -> Engine:
    """The engine that a configuration asks for, around a module whose weights are in place.

    Raises:
        UserError: a DeepSpeed configuration that cannot be used.
    """
    engine = _make_engine(config, moco, device)
    distributed.adopt_groups()
    return engine


def _make_engine(config: Config, moco: MoCo, device: torch.device) -> Engine:
    optim, run = config.optim, config.run
    settings = EngineSettings(
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        precision=run.precision,
        clip_norm=optim.clip_grad,
        parts=run.accumulation_steps,
        compile=run.compile,
        recompute=run.activation_checkpointing,
        shard_size=run.fsdp_shard_size,
    )
    if run.engine == "deepspeed":
        # Imported late: it takes seconds, and the other engines work without it.
        from moco_scale.engines.deepspeed import (
            DeepSpeedEngine,
            ShardedDeepSpeedEngine,
            check_configuration,
        )

        read = read_configuration(
            run.deepspeed,
            batch_size=optim.batch_size,
            world=distributed.world_size(),
            precision=run.precision,
            clip_norm=optim.clip_grad,
            parts=run.accumulation_steps,
            parameters=sum(p.numel() for p in moco.trained_parameters().values()),
            # Not while BatchNorm groups, which have communicators of their own, add theirs up.
            overlap=device.type == "cuda" and not spans_ranks(moco),
            may_overlap=distributed.launches_in_order() or not spans_ranks(moco),
            compiled=run.compile,
        )
        check_configuration(run.deepspeed, read.configuration)
        settings = dataclasses.replace(settings, scaling=read.scaling)
        kind = ShardedDeepSpeedEngine if read.stage == 3 else DeepSpeedEngine
        engine: Engine = kind(moco, settings, device, read.configuration)
        engine.notes += read.notes
        return engine
    if run.engine == "fsdp":
        from moco_scale.engines.fsdp import FSDPEngine

        return FSDPEngine(moco, settings, device)
    from moco_scale.engines.ddp import DDPEngine

    return DDPEngine(moco, settings, device)
