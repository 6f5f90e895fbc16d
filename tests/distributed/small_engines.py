"""Networks small enough for emulated half floats, and any engine around them, for tests."""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock

from moco_scale.data.sampling.order import Samples
from moco_scale.distributed import collectives
from moco_scale.engines.base import Engine, EngineSettings
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import GroupedBatchNorm2d
from moco_scale.models.convnext import Block
from moco_scale.models.encoder import Encoder
from moco_scale.models.stochastic_depth import Crops, encoding
from moco_scale.models.vit import MoCoViT, ViTShape

BATCH, SIZE, DIM = 8, 12, 16
RATE, MOMENTUM, ALPHA = 0.05, 0.9, 0.9
CPU = torch.device("cpu")


def small_encoder() -> Encoder:
    """A stem and two residual blocks: what a ResNet has, small enough for emulated half floats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        stem = (nn.Conv2d(3, 8, 3, stride=2, bias=False), GroupedBatchNorm2d(8), nn.ReLU())
        blocks = [BasicBlock(8, 8, norm_layer=GroupedBatchNorm2d) for _ in range(2)]
        backbone = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(backbone, nn.Linear(8, DIM), 8)


def small_transformer() -> Encoder:
    """A transformer of two blocks on patches of four pixels; its first layer stays as drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        backbone = MoCoViT(ViTShape(4, 16, 2, 4), SIZE, train_patch_embedding=False)
        return Encoder(backbone, nn.Linear(16, DIM), 16)


def small_convnext() -> Encoder:
    """Two stages of two blocks, of which images skip the last three at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        stages = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
        backbone = ConvNeXt(stages, 0.5, layer_scale=0.5, num_classes=DIM, block=Block)
        projection = backbone.classifier[-1]
        backbone.classifier[-1] = nn.Identity()
        return Encoder(backbone, projection, 16)


ENCODERS = {"resnet": small_encoder, "vit": small_transformer, "convnext": small_convnext}


def named(step: int, mine: slice, *views: int) -> AbstractContextManager[None]:
    """Name this rank's images of a step for what is drawn for each of them."""
    index = np.arange(BATCH)[mine]
    return encoding(Crops(1, Samples(index, np.full_like(index, step)), views))


def engine_around(
    kind: str,
    moco: MoCo,
    settings: EngineSettings,
    zero: dict[str, Any] | None = None,
    device: torch.device = CPU,
) -> Engine:
    if kind.startswith("zero"):
        from moco_scale.config.deepspeed_file import look_through
        from moco_scale.engines.deepspeed import DeepSpeedEngine, ShardedDeepSpeedEngine

        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"zero_optimization": {"stage": int(kind[4:]), **(zero or {})}}, file)
            file.flush()
            read = look_through(
                file.name,
                batch_size=BATCH,
                world=collectives.world_size(),
                precision=settings.precision,
                clip_norm=settings.clip_norm,
                micro_batches=settings.micro_batches,
                parameters=sum(p.numel() for p in moco.query.parameters()),
                overlap=False,
                compiled=settings.compile,
            )
        made = ShardedDeepSpeedEngine if kind == "zero3" else DeepSpeedEngine
        return made(moco, settings, device, read.configuration)
    from moco_scale.engines.ddp import DDPEngine
    from moco_scale.engines.fsdp import FSDPEngine

    return (DDPEngine if kind == "ddp" else FSDPEngine)(moco, settings, device)
