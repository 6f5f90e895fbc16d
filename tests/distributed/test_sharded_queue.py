"""The sharded queue on real ranks against a plain deque and a row of logits for each query."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import TINY
from dense_infonce import compare, enqueue, loss_and_gradient, new_ring
from harness import run_ranks
from torch import Tensor

from moco_scale.checkpoints import checkpoint
from moco_scale.checkpoints.state import save_state
from moco_scale.config import command_line
from moco_scale.distributed import collectives
from moco_scale.methods.infonce import Negatives, infonce
from moco_scale.methods.key_queue import DTYPES, KeyQueue, share
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

DIM, BATCH, IMAGES, T = 5, 12, 20, 0.1
# Less than a rank has queries, no multiple of anything, several batches.
LENGTHS = (2, 29, 60)
MASKS = ((False, False), (True, False), (True, True))


def unit_rows(count: int, seed: int) -> Tensor:
    rows = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def images_of(step: int) -> list[int]:
    return np.random.default_rng(step).permutation(IMAGES)[:BATCH].tolist()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Queries and their keys, which resemble them: [12, 5] each."""
    query = unit_rows(BATCH, 2 * step)
    return query, F.normalize(unit_rows(BATCH, 2 * step + 1) + query, dim=1)


def cases() -> list[tuple[int, str, tuple[bool, bool]]]:
    return list(itertools.product(LENGTHS, DTYPES, MASKS))


def make_queue(case: tuple[int, str, tuple[bool, bool]], shard: tuple[int, int]) -> KeyQueue:
    length, dtype, (unfilled, same) = case
    return KeyQueue(
        *(length, DIM, 3, "cpu"),
        dtype=DTYPES[dtype],
        shard=shard,
        mask_unfilled=unfilled,
        mask_same_image=same,
    )


STEPS = 6  # empty, filling, full, overwritten


def one_rank() -> list[list[list[Tensor]]]:
    """Of each case and step: loss and gradient of this rank's queries, their mean similarity."""
    rank, world = collectives.rank(), collectives.world_size()
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    results = []
    for case in cases():
        queue, steps = make_queue(case, (rank, world)), []
        for step in range(STEPS):
            query, keys = batch_of(step)
            own = query[mine].requires_grad_()
            images = np.array(images_of(step))
            contrast = queue.contrast(own, keys[mine], T, images[mine])
            (gradient,) = torch.autograd.grad(contrast.loss.sum(), own)
            steps.append([contrast.loss.detach(), gradient, contrast.negative_similarity])
            queue.enqueue(keys, images)
        results.append(steps)
    return results


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradient_equal_the_dense_ones(world: int) -> None:
    ranks = run_ranks(one_rank, world)
    for number, case in enumerate(cases()):
        _, dtype, (unfilled, same) = case
        ring = new_ring(make_queue(case, (0, 1)).keys)
        for step in range(STEPS):
            query, keys = batch_of(step)
            loss, gradient, similarity = (
                torch.cat([rank[number][step][i] for rank in ranks]) for i in range(3)
            )
            expected = loss_and_gradient(
                *(query, keys, images_of(step), ring, T),
                mask_unfilled=unfilled,
                mask_same_image=same,
            )
            compare(loss, gradient, expected)
            counted = [s.key for s in ring if s.image >= 0 or not unfilled]
            mean = torch.stack(counted).mean(0) if counted else torch.zeros(DIM)
            torch.testing.assert_close(similarity, query @ mean, rtol=1e-5, atol=1e-5)
            enqueue(ring, keys, images_of(step), DTYPES[dtype])


def test_a_query_that_is_not_finite_spoils_no_other() -> None:
    results = run_ranks(with_a_bad_query, 2)
    assert results[0].isnan().tolist() == [False, True, False]
    assert results[1].isfinite().all()


def with_a_bad_query() -> Tensor:
    rank = collectives.rank()
    query, keys = unit_rows(3, rank), unit_rows(3, 10 + rank)
    if rank == 0:
        query[1] = math.nan
    negatives = Negatives(unit_rows(7, 20 + rank), sharded=True)
    return infonce(query, keys, negatives, T).loss


def traffic() -> dict[str, int]:
    """Bytes handed to each collective by one loss and one enqueue of a queue of 10,000 keys."""
    sent: dict[str, int] = {}
    for name in ("_all_gather", "_reduce_scatter"):
        real = getattr(collectives, name)

        def watched(out: Tensor, rows: Tensor, real: Any = real, name: str = name) -> Any:
            sent[name] = sent.get(name, 0) + rows.numel() * rows.element_size()
            return real(out, rows)

        setattr(collectives, name, watched)
    queue = KeyQueue(10_000, DIM, 0, "cpu", shard=(collectives.rank(), collectives.world_size()))
    images = np.arange(6)
    queue.contrast(unit_rows(6, 0), unit_rows(6, 1), T, images)
    queue.enqueue(unit_rows(12, 2), np.arange(12))
    return sent


def test_what_travels_does_not_depend_on_the_queue() -> None:
    world = 2
    expected = {"_all_gather": 6 * DIM * 4, "_reduce_scatter": world * 6 * (DIM + 3) * 4}
    assert run_ranks(traffic, world) == [expected] * world


# Checkpoints: written by some ranks, read by others


def write(folder: str, length: int, sharded: bool) -> None:
    rank, world = collectives.rank(), collectives.world_size()
    whole = unit_rows(length, 1).bfloat16()
    first, end = share(length, rank, world)
    tensors = {"other": torch.ones(2), "queue.keys": whole[first:end] if sharded else whole}
    mine = {"queue.keys": checkpoint.Rows(first, end - first, length)} if sharded else {}
    owned = {n: t for n, t in tensors.items() if n in mine or checkpoint.owner(n) == rank}
    checkpoint.save(Path(folder), owned, {}, rows=mine)


def read(folder: str, length: int) -> tuple[Tensor, Tensor]:
    first, end = share(length, collectives.rank(), collectives.world_size())
    rows = {"queue.keys": checkpoint.Rows(first, end - first, length)}
    return (
        checkpoint.load(Path(folder), rows)["queue.keys"],
        checkpoint.load(Path(folder))["queue.keys"],
    )


@pytest.mark.parametrize(("writers", "sharded"), [(1, False), (3, True)])
def test_rows_written_by_some_ranks_are_read_by_others(
    tmp_path: Path, writers: int, sharded: bool
) -> None:
    length = 13
    run_ranks(write, writers, str(tmp_path / "a"), length, sharded)
    run_ranks(write, writers, str(tmp_path / "b"), 2, sharded)  # ranks with no row
    expected = unit_rows(length, 1).bfloat16()
    for world in (1, 2):
        parts = run_ranks(read, world, str(tmp_path / "a"), length)
        assert torch.equal(torch.cat([part for part, _ in parts]), expected)
        assert all(torch.equal(whole, expected) for _, whole in parts)
    parts = run_ranks(read, 3, str(tmp_path / "b"), 2)
    assert torch.equal(torch.cat([part for part, _ in parts]), unit_rows(2, 1).bfloat16())


# Whole runs

SMALL = [*TINY, "--nce-k", "21", "--mask-same-image", "--queue-dtype", "bf16"]


def train(flags: list[str], parts: int) -> list[dict[str, Any]]:
    """Go on for ``parts`` times two steps, then save: queues before and after, and mean loss."""
    run = Run(command_line.parse(flags))
    seen = []
    for _ in range(parts):
        before = {name: t.clone() for name, t in run.queue.state_dict().items()}
        loader = run.loader(run.step + 2)
        for batch in loader:
            train_step(run, batch)
            run.step += 1
        after = {name: t.clone() for name, t in run.queue.state_dict().items()}
        seen.append({"before": before, "after": after, "means": run.meters.read()[0]})
    save_state(run, epoch_done=False)
    run.folder.finish_saving()
    return seen


def joined(ranks: list[dict[str, Any]], when: str, sharded: bool) -> dict[str, Tensor]:
    """The whole queue."""
    states = [rank[when] for rank in ranks]
    if not sharded:
        return states[0]
    whole = {n: torch.cat([s[n] for s in states]) for n in ("keys", "samples")}
    return states[0] | whole


# Both terms of a symmetric loss, in two parts: four losses a step.
OFTEN = ("--symmetric", "--accumulation-steps", "2", "--batch-size", "16")
LONG = [(4, "sharded"), (2, "replicated"), (1, "sharded"), (4, "sharded")]


@pytest.mark.parametrize(
    ("parts", "more"),
    [
        ([(2, "sharded"), (1, "replicated")], OFTEN),
        pytest.param(LONG, (), marks=pytest.mark.slow),
    ],
    ids=["few", "many"],
)
def test_a_sharded_run_goes_on_replicated_on_other_ranks_and_back(
    tiny_shards: Path, tmp_path: Path, parts: list[tuple[int, str]], more: tuple[str, ...]
) -> None:
    # No steps are taken, so that rounding cannot grow; the queues turn over all the same.
    flags = [*SMALL, *more, "--base-lr", "0", "--lr-min", "0", "--data-dir", str(tiny_shards)]
    one = [*flags, "--output-dir", str(tmp_path / "one")]
    other = [*flags, "--output-dir", str(tmp_path / "other")]
    uninterrupted = run_ranks(train, 1, one, len(parts))[0]
    last: dict[str, Tensor] = {}
    for (world, kind), expected in zip(parts, uninterrupted, strict=True):
        results = run_ranks(train, world, [*other, "--queue", kind], 1)
        ranks = [parts_of_rank[0] for parts_of_rank in results]
        before = joined(ranks, "before", kind == "sharded")
        assert all(torch.equal(before[name], last[name]) for name in last)
        last = joined(ranks, "after", kind == "sharded")
        for name in ("pointer", "enqueued", "samples"):
            assert torch.equal(last[name], expected["after"][name])
        # bf16 may round the same key to a neighbour.
        torch.testing.assert_close(
            last["keys"].float(), expected["after"]["keys"].float(), rtol=0.01, atol=1e-3
        )
        for rank in ranks:
            for name, mean in expected["means"].items():
                assert rank["means"][name] == pytest.approx(mean, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_a_sharded_run_that_is_interrupted_repeats_itself_to_the_bit(
    tiny_shards: Path, tmp_path: Path
) -> None:
    flags = [*SMALL, "--queue", "sharded", "--data-dir", str(tiny_shards)]
    whole = run_ranks(train, 2, [*flags, "--output-dir", str(tmp_path / "whole")], 2)
    for _ in range(2):
        halves = run_ranks(train, 2, [*flags, "--output-dir", str(tmp_path / "halves")], 1)
    for half, once in zip(halves, whole, strict=True):
        assert half[0]["means"] == once[1]["means"]
    states = [
        checkpoint.load(tmp_path / name / "checkpoints" / "step-00000004")
        for name in ("whole", "halves")
    ]
    assert states[0].keys() == states[1].keys()
    differing = {n for n in states[0] if not torch.equal(states[0][n], states[1][n])}
    # Saving averages running statistics over the ranks: once more often here.
    assert {n for n in differing if "running_" not in n} == set()
