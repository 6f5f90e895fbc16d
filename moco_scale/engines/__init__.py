"""How a model is wrapped, stepped and saved; nothing outside knows DeepSpeed or DDP."""

from __future__ import annotations

import torch

from moco_scale import distributed
from moco_scale.batchnorm import spans_ranks
from moco_scale.config import Config
from moco_scale.deepspeed_config import read_configuration
from moco_scale.engines.base import Engine, SGDSettings
from moco_scale.moco import MoCo

__all__ = ["Engine", "make_engine"]


def make_engine(config: Config, moco: MoCo, device: torch.device) -> Engine:
    """The engine that a configuration asks for, around a module whose weights are in place.

    Raises:
        UserError: a DeepSpeed configuration that cannot be used.
    """
    optimizer = SGDSettings(config.optim.momentum, config.optim.weight_decay)
    if config.run.engine == "deepspeed":
        # Imported late: it takes seconds, and the other engines work without it.
        from moco_scale.engines.deepspeed import DeepSpeedEngine, ShardedDeepSpeedEngine

        configuration, scaling = read_configuration(
            config.run.deepspeed,
            batch_size=config.optim.batch_size,
            world=distributed.world_size(),
            precision=config.run.precision,
            parameters=sum(p.numel() for p in moco.trained_parameters().values()),
            # Two communicators at work at once, DeepSpeed's and a BatchNorm group's, can deadlock.
            overlap=device.type == "cuda" and not spans_ranks(moco),
        )
        stage = configuration["zero_optimization"]["stage"]
        kind = ShardedDeepSpeedEngine if stage == 3 else DeepSpeedEngine
        return kind(moco, optimizer, config.run.precision, device, configuration, scaling)
    if config.run.engine == "fsdp":
        from moco_scale.engines.fsdp import FSDPEngine

        return FSDPEngine(moco, optimizer, config.run.precision, device)
    from moco_scale.engines.ddp import DDPEngine

    return DDPEngine(moco, optimizer, config.run.precision, device)
