"""Recipes, published runs as data: settings, their source, command and result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Published run.

    Attributes:
        source: of the settings.
        command: starts it.
        published: accuracy that its authors report.
        settings: values of the configuration's fields; flags take precedence.
        published_for: other values of fields to which `published` applies too.
    """

    source: str
    command: str
    published: str
    settings: dict[str, Any] = field(default_factory=dict)
    published_for: dict[str, tuple[Any, ...]] = field(default_factory=dict)


_START = "deepspeed --num_gpus 8 train.py --deepspeed ds_configs/zero1.json --recipe "

_V1: dict[str, Any] = {
    "dataset": "imagenet",
    "aug": "v1",
    "crop": 0.2,
    "model": "resnet50",
    "head": "linear",
    "dim": 128,
    "bn_group_size": 32,
    "nce_k": 65536,
    "nce_t": 0.07,
    "alpha": 0.999,
    "batch_size": 256,
    "base_lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr_scheduler": "step",
    "lr_decay_epochs": (120, 160),
    "lr_decay_rate": 0.1,
    "warmup_epoch": 0,
    "lr_min": 0.0,
    "epochs": 200,
}

RECIPES: dict[str, Recipe] = {
    "v1": Recipe(
        source="He et al. 2020, Momentum Contrast, section 4 and the official code's defaults",
        command=_START + "v1",
        published="ImageNet linear top-1 60.6 in the paper, 60.8 +- 0.2 over the official code's "
        "runs (200 epochs)",
        settings=_V1,
    ),
    "v1-b1024": Recipe(
        source="the public re-implementation of 2020 (bl0/moco): 8 x 128, 40 hours on 8 V100",
        command=_START + "v1-b1024",
        published="ImageNet linear top-1 60.79 with K = 65536, 59.89 with K = 16384",
        settings=_V1
        | {
            "aug": "cj",
            "crop": 0.08,
            "bn_group_size": 128,
            "batch_size": 1024,
            "base_lr": 0.1,
            "lr_scheduler": "cosine",
            "lr_min": 1e-6,
            "warmup_epoch": 5,
        },
        published_for={"nce_k": (16384,)},
    ),
    "v2": Recipe(
        source="Chen et al. 2020, Improved Baselines with Momentum Contrastive Learning, table 1",
        command=_START + "v2",
        published="ImageNet linear top-1 67.5 +- 0.1 (200 epochs), 71.1 (800 epochs)",
        settings=_V1
        | {
            "aug": "v2",
            "head": "mlp",
            "nce_t": 0.2,
            "lr_scheduler": "cosine-epoch",
        },
        published_for={"epochs": (800,)},
    ),
    "cifar10": Recipe(
        source="the official CIFAR-10 demo of MoCo",
        command="make cifar10   # or: python train.py --recipe cifar10 --data-dir data/cifar10",
        published="kNN top-1 82.6 / 86.3 / 88.7 after 200 / 400 / 800 epochs; with --symmetric "
        "85.3 / 88.5 / 89.7",
        settings={
            "dataset": "cifar10",
            "aug": "cifar",
            "crop": 0.08,
            "model": "resnet18",
            "head": "linear",
            "dim": 128,
            "bn_group_size": 64,
            "nce_k": 4096,
            "nce_t": 0.1,
            "alpha": 0.99,
            "batch_size": 512,
            "base_lr": 0.03,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr_scheduler": "cosine-epoch-end",
            "lr_min": 0.0,
            "warmup_epoch": 0,
            "epochs": 200,
        },
        published_for={"epochs": (400, 800), "symmetric": (True,)},
    ),
}

DEFAULT_RECIPE = "v1-b1024"
