"""One, two and four processes see the same batches, crops, shuffles, groups and queue."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import TINY
from harness import run_ranks
from textbook import epoch_batches, permutation
from torch import Tensor, nn

from moco_scale.config import command_line
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

STEPS, BATCH, IMAGES, SEED = 5, 8, 32, 11


class Seen(NamedTuple):
    """What one process met, step by step; rows are samples."""

    samples: list[Tensor]
    crops: list[Tensor]
    query_inputs: list[Tensor]
    key_inputs: list[Tensor]
    normalised: list[Tensor]
    queue: Tensor


def one_rank(flags: list[str]) -> Seen:
    run = Run(command_line.parse(flags))
    seen = Seen([], [], [], [], [], run.queue.keys)

    def inputs(into: list[Tensor]) -> Any:
        return lambda module, args: into.append(args[0].clone())

    moco = run.engine.moco
    moco.query.register_forward_pre_hook(inputs(seen.query_inputs))
    moco.key.register_forward_pre_hook(inputs(seen.key_inputs))
    first_norm = next(m for m in moco.key.modules() if isinstance(m, nn.BatchNorm2d))
    first_norm.register_forward_hook(lambda m, args, out: seen.normalised.append(out.clone()))
    loader = run.loader(STEPS)
    for batch in loader:
        seen.samples.append(batch.index)
        seen.crops.append(batch.views.transpose(0, 1))  # samples first
        train_step(run, batch)
    return seen


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Seen]]:
    """By the number of processes: what each of them saw. No steps are taken: weights stay."""
    results = {}
    for world in (1, 2, 4):
        out = tmp_path_factory.mktemp("same") / str(world)
        # An all but frozen network, so that rounding cannot grow, and no layer of single pixels,
        # where four numbers that hardly differ would be normalised. Groups of 4 hold half a
        # process's samples, all of them, and those of two processes.
        flags = [*TINY, "--stem", "cifar", "--nce-k", "20", "--base-lr", "0"]
        flags += ["--rng-seed", str(SEED), "--data-dir", str(tiny_shards), "--output-dir", str(out)]
        results[world] = run_ranks(one_rank, world, flags)
    return results


def whole(ranks: list[Seen], what: str, step: int) -> Tensor:
    """The global batch: every process's rows, in the order of the processes."""
    return torch.cat([getattr(seen, what)[step] for seen in ranks])


def test_batches_and_shuffles_are_the_documented_ones(runs: dict[int, list[Seen]]) -> None:
    orders = epoch_batches(IMAGES, BATCH, SEED, STEPS)
    for step in range(STEPS):
        assert whole(runs[1], "samples", step).tolist() == orders[step]
        # Encoded in shuffled order: at each position the sample that the permutation names.
        shuffle = permutation(BATCH, SEED, "shuffle-0", step)
        assert sorted(shuffle) == list(range(BATCH)) != shuffle
        keys = whole(runs[1], "key_inputs", step)
        assert len({key.numpy().tobytes() for key in keys}) == BATCH
    assert any(orders[step] != orders[0] for step in range(4, STEPS))  # the second epoch


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("what", ["samples", "crops", "query_inputs", "key_inputs"])
def test_what_enters_the_encoders_is_the_same_to_the_bit(
    runs: dict[int, list[Seen]], world: int, what: str
) -> None:
    for step in range(STEPS):
        one, many = whole(runs[1], what, step), whole(runs[world], what, step)
        assert len(one) == BATCH
        assert torch.equal(many, one)


@pytest.mark.parametrize("world", [2, 4])
def test_groups_are_the_same(runs: dict[int, list[Seen]], world: int) -> None:
    for step in range(STEPS):
        one = whole(runs[1], "normalised", step)
        torch.testing.assert_close(whole(runs[world], "normalised", step), one)
        # The first normalisation has neither scale nor shift yet: it shows what was averaged.
        for start in range(0, BATCH, 4):
            assert one[start : start + 4].mean((0, 2, 3)).abs().max() < 1e-4
        assert one[2:6].mean((0, 2, 3)).abs().max() > 1e-2


@pytest.mark.parametrize("world", [2, 4])
def test_the_queue_is_the_same_on_every_process(runs: dict[int, list[Seen]], world: int) -> None:
    (one,) = runs[1]
    assert one.queue.shape == (20, 128)
    for seen in runs[world]:
        assert torch.equal(seen.queue, runs[world][0].queue)
        torch.testing.assert_close(seen.queue, one.queue, rtol=1e-4, atol=1e-5)
