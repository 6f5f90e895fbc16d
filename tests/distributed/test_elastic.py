"""Any number of ranks and workers sees the same samples, and goes on where others stopped."""

from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from commands import TINY
from harness import run_ranks
from torch import Tensor

from moco_scale.config import command_line
from moco_scale.data.images.augment import AUGMENTATIONS, draw_params
from moco_scale.data.images.device_augment import DeviceAugment
from moco_scale.data.loading.loader import ViewBatch, pretraining_loader
from moco_scale.data.open import open_shards
from moco_scale.data.sampling.mixture import in_whole_batches
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.shards.protocols import Shards
from moco_scale.training import loop
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

IMAGES, BATCH, SEED, SIZE = 32, 8, 5, 16
PER_EPOCH = IMAGES // BATCH
END = 2 * PER_EPOCH
AUG = AUGMENTATIONS["v2"]


class Sets:
    """A set on its own, and the same twice with weights and epochs of their own."""

    def __init__(self, folder: Path) -> None:
        alone = open_shards(folder, "train")
        mixed = open_shards(f"{folder}:0.8,{folder}/../shards:0.2", "train")
        self.plans: dict[str, tuple[Shards, BatchPlan]] = {
            "alone": (alone, BatchPlan(alone.order(SEED), BATCH)),
            "mixed": (mixed, BatchPlan(in_whole_batches(mixed.order(SEED), BATCH, 35), BATCH)),
        }


@pytest.fixture(scope="module")
def sets(tiny_shards: Path) -> Sets:
    return Sets(tiny_shards)


def read(
    sets: Sets, kind: str, rank: int, world: int, workers: int, start: int = 0, end: int = END
) -> list[ViewBatch]:
    shards, plan = sets.plans[kind]
    with pretraining_loader(
        shards,
        plan,
        AUG,
        SIZE,
        rank=rank,
        world=world,
        num_workers=workers,
        start_step=start,
        end_step=end,
    ) as loader:
        return list(loader)


def augmented(batch: ViewBatch) -> Tensor:
    """As the training step does it: float32 [views, b, 3, S, S]."""
    views = []
    for view, crops in enumerate(batch.views):
        apply = DeviceAugment(AUG.of(view), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        params = draw_params(AUG, SEED, batch.passes.numpy(), batch.index.numpy(), view)
        views.append(apply(crops, params))
    return torch.stack(views)


@pytest.fixture(scope="module")
def alone(sets: Sets) -> dict[str, list[tuple[ViewBatch, Tensor]]]:
    """What one rank without workers reads: batches and their augmented pixels."""
    return {
        kind: [(batch, augmented(batch)) for batch in read(sets, kind, 0, 1, 0)]
        for kind in sets.plans
    }


@pytest.mark.parametrize("kind", ["alone", "mixed"])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_crops_and_pixels_are_the_same(
    sets: Sets,
    alone: dict[str, list[tuple[ViewBatch, Tensor]]],
    kind: str,
    world: int,
    workers: int,
) -> None:
    ranks = [read(sets, kind, rank, world, workers) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {END}
    for (whole, pixels), *parts in zip(alone[kind], *ranks, strict=True):
        assert {(part.step, part.epoch) for part in parts} == {(whole.step, whole.epoch)}
        for name in ("index", "passes", "labels"):
            got = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(got, getattr(whole, name))
        assert torch.equal(torch.cat([part.views for part in parts], 1), whole.views)
        assert torch.equal(torch.cat([augmented(part) for part in parts], 1), pixels)


def test_what_four_ranks_leave_two_and_one_go_on_with(sets: Sets) -> None:
    """Stops anywhere, with batches in the workers' hands that nobody has used."""
    random = np.random.default_rng(0)
    first, second = sorted(random.choice(np.arange(1, END), 2, replace=False).tolist())
    seen: list[tuple[int, int]] = []
    for world, start, end in ((4, 0, first), (2, first, second), (1, second, END)):
        for rank in range(world):
            shards, plan = sets.plans["alone"]
            loader = pretraining_loader(
                shards,
                plan,
                AUG,
                SIZE,
                rank=rank,
                world=world,
                num_workers=1,
                start_step=start,
                end_step=END,
            )
            for batch in loader:
                seen += zip(batch.passes.tolist(), batch.index.tolist(), strict=True)
                if batch.step == end - 1:
                    break
            loader.close()
    assert Counter(seen) == Counter((p, i) for p in range(2) for i in range(IMAGES))


def samples_of_a_run(flags: list[str]) -> list[tuple[int, int]]:
    """(pass, sample) of every step that a run takes from its checkpoint on."""
    run = Run(command_line.parse(flags))
    seen: list[tuple[int, int]] = []

    def record(run: Run, batch: ViewBatch) -> None:
        seen.extend(zip(batch.passes.tolist(), batch.index.tolist(), strict=True))
        train_step(run, batch)

    with mock.patch.object(loop, "train_step", record):
        loop.train(run)
    return seen


@pytest.mark.slow
def test_a_run_is_stopped_on_four_ranks_and_goes_on_on_two_and_one(
    tiny_shards: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data-dir", str(tiny_shards), "--output-dir", str(tmp_path)]
    flags += ["--num-workers", "1", "--checkpoint-freq", "1"]
    seen: list[tuple[int, int]] = []
    for world, stop in ((4, 3), (2, 5), (1, END)):
        for part in run_ranks(samples_of_a_run, world, [*flags, "--max-steps", str(stop)]):
            seen += part
        assert len(seen) == stop * BATCH
    assert Counter(seen) == Counter((p, i) for p in range(2) for i in range(IMAGES))
