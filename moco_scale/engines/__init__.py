"""Engines: wrap, step and save a model; nothing outside knows DeepSpeed or DDP."""

from __future__ import annotations

import dataclasses

import torch

from moco_scale.config.deepspeed_file import ReadConfiguration, look_through, refuse
from moco_scale.config.deepspeed_keys import MONITORS
from moco_scale.config.schema import Config
from moco_scale.distributed import collectives
from moco_scale.engines.base import Engine, EngineSettings
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import spans_ranks

__all__ = ["Engine", "EngineSettings", "make_engine", "read_deepspeed"]


def read_deepspeed(
    config: Config,
    world: int,
    parameters: int,
    *,
    overlap: bool = False,
    may_overlap: bool = True,
) -> ReadConfiguration:
    """Read a configuration's ``--deepspeed`` file for so many processes and let DeepSpeed check it.

    Args:
        config: of the run.
        world: number of processes.
        parameters: trained numbers.
        overlap: as of :func:`config.deepspeed_file.look_through`.
        may_overlap: likewise.

    Raises:
        UserError: The file is wrong; the message has all its problems.
    """
    from moco_scale.engines.deepspeed import ask_deepspeed

    run = config.run
    read = look_through(
        run.deepspeed,
        batch_size=config.optim.batch_size,
        world=world,
        precision=run.precision,
        clip_norm=config.optim.clip_grad,
        micro_batches=run.accumulation_steps,
        parameters=parameters,
        overlap=overlap,
        may_overlap=may_overlap,
        compiled=run.compile,
        batch_flag=config.flag("batch_size"),
    )
    refuse(run.deepspeed, [*read.problems, *ask_deepspeed(read.configuration)])
    return read


def make_engine(config: Config, moco: MoCo, device: torch.device) -> Engine:
    """Make a configuration's engine around a module whose weights are loaded.

    Raises:
        UserError: The DeepSpeed configuration cannot be used.
    """
    engine = _make_engine(config, moco, device)
    collectives.adopt_groups()
    return engine


def _make_engine(config: Config, moco: MoCo, device: torch.device) -> Engine:
    optim, run = config.optim, config.run
    settings = EngineSettings(
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        precision=run.precision,
        clip_norm=optim.clip_grad,
        micro_batches=run.accumulation_steps,
        compile=run.compile,
        activation_checkpointing=run.activation_checkpointing,
        shard_size=run.fsdp_shard_size,
    )
    if run.engine == "deepspeed":
        # Imported late: it takes seconds, and the other engines work without it.
        from moco_scale.engines.deepspeed import DeepSpeedEngine, ShardedDeepSpeedEngine

        read = read_deepspeed(
            config,
            collectives.world_size(),
            sum(p.numel() for p in moco.trained_parameters().values()),
            # Not while BatchNorm groups exchange statistics over communicators of their own.
            overlap=device.type == "cuda" and not spans_ranks(moco),
            may_overlap=collectives.launches_in_order() or not spans_ranks(moco),
        )
        if run.preflight:  # it must leave nothing behind, here or on a server
            for monitor in MONITORS:
                read.configuration.pop(monitor, None)
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
