"""Sets of images that lie elsewhere, and what is read of them, for tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from http_folder import FaultyFolder

from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading.loader import ViewBatch, pretraining_loader
from moco_scale.data.remote.download import RetryPolicy
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.shards.protocols import Shards

AUG = AUGMENTATIONS["cifar"]
WINDOW = 2
# In the place of Patience where a test would wait between attempts.
HURRIED = partial(RetryPolicy, first_wait=0.002, longest_wait=0.02)


def source_of(server: FaultyFolder | str, cache: Path, size: float = 1.0) -> ShardSource:
    url = server if isinstance(server, str) else server.url
    return ShardSource(url, cache_dir=str(cache), cache_size=size, give_up=20.0)


def batches(shards: Shards, workers: int, steps: int = 8, start: int = 0) -> list[ViewBatch]:
    plan = BatchPlan(shards.order(3, WINDOW), 8)
    loader = pretraining_loader(
        shards, plan, AUG, 16, num_workers=workers, start_step=start, end_step=steps
    )
    with loader:
        return list(loader)


def same(first: list[ViewBatch], second: list[ViewBatch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert torch.equal(a.index, b.index) and torch.equal(a.passes, b.passes)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.views, b.views)
