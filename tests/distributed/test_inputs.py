"""Inputs made one step ahead, as on a GPU, are the same as those made when they are asked for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY
from harness import run_ranks
from torch import Tensor

from moco_scale.checkpoints.state import save_state
from moco_scale.config import command_line
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.distributed import collectives
from moco_scale.training.inputs import Inputs
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

STEPS = 5  # an epoch has 4


def started(flags: list[str], ahead: bool) -> Run:
    run = Run(command_line.parse(flags))
    run.inputs = Inputs(run.config, run.plan, run.shuffle, run.device, ahead)
    return run


def flags_of(shards: Path, out: Path, *more: str) -> list[str]:
    return [*TINY, "--data-dir", str(shards), "--output-dir", str(out), *more]


def seen(flags: list[str], ahead: bool) -> list[list[Tensor]]:
    """All inputs of each step on this rank: query views in two parts, key views, a way back."""
    run = started(flags, ahead)
    steps = []
    for batch in run.inputs.ahead(run.loader(STEPS)):
        inputs, half = run.inputs.take(batch), len(batch.index) // 2
        tensors = [*inputs.queries(slice(0, half)), *inputs.queries(slice(half, 2 * half))]
        for term in range(len(run.inputs.terms)):
            inputs.receive(term)
            keys = inputs.keys(term)
            tensors += [keys, inputs.gather_back(term, keys.flatten(1)[:, :50])]
        steps.append([tensor.clone() for tensor in tensors])
    return steps


@pytest.mark.parametrize("world", [1, 2])
def test_inputs_are_the_same_to_the_bit(tiny_shards: Path, tmp_path: Path, world: int) -> None:
    flags = flags_of(tiny_shards, tmp_path, "--symmetric", "--aug", "v3")
    usual, ahead = (run_ranks(seen, world, flags, way) for way in (False, True))
    for one, other in zip(usual, ahead, strict=True):
        assert len(one) == len(other) == STEPS
        for wanted, got in zip(one, other, strict=True):
            assert len(wanted) == len(got) == 2 * 2 + 2 * 2
            assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        # The two views of a symmetric loss swap their places, and each keeps its own chain.
        assert not torch.equal(one[0][0], one[0][1])


def test_one_batch_is_made_ahead_and_no_more(tiny_shards: Path, tmp_path: Path) -> None:
    run = started(flags_of(tiny_shards, tmp_path), ahead=True)
    read: list[int] = []

    def counted() -> Iterator[ViewBatch]:
        for batch in run.loader(STEPS):
            read.append(batch.step)
            yield batch

    for batch in run.inputs.ahead(counted()):
        assert read == list(range(min(batch.step + 2, STEPS)))
        assert list(run.inputs._ready) == read[batch.step :]
        run.inputs.take(batch)
    assert not run.inputs._ready
    assert read == list(range(STEPS))


def train(run: Run, steps: int) -> None:
    run.engine.moco.train()
    for batch in run.inputs.ahead(run.loader(STEPS)):
        train_step(run, batch)
        run.step += 1
        if run.step == steps:
            break  # one more batch has been made ready
    save_state(run, epoch_done=False)
    run.folder.finish_saving()


def whole_and_in_parts(whole_flags: list[str], parts_flags: list[str]) -> None:
    """One run made as on a CPU, one made ahead, stopped and resumed."""
    whole = started(whole_flags, ahead=False)
    train(whole, 4)
    train(started(parts_flags, ahead=True), 2)
    resumed = started(parts_flags, ahead=True)
    assert resumed.step == 2
    train(resumed, 4)
    assert resumed.step == whole.step == 4
    assert torch.equal(resumed.queue.keys, whole.queue.keys)
    state = resumed.engine.moco.state_dict()
    for name, tensor in whole.engine.moco.state_dict().items():
        if "running" in name:  # averaged over the ranks at another step too
            torch.testing.assert_close(state[name], tensor)
        else:
            assert torch.equal(state[name], tensor)


def test_a_batch_made_ahead_and_not_trained_on_is_not_consumed(
    tiny_shards: Path, tmp_path: Path
) -> None:
    flags = [flags_of(tiny_shards, tmp_path / name, "--symmetric") for name in ("whole", "parts")]
    run_ranks(whole_and_in_parts, 2, *flags)


def order_of_messages(flags: list[str]) -> tuple[bool, list[str]]:
    """Whether nothing is made ahead, and what happened in one step, in this order."""
    happened: list[str] = []
    run = Run(command_line.parse(flags))
    wait, query = collectives.PendingRows.wait, run.engine.query

    def noted(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            happened.append(name)
            return action(*args, **kwargs)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.PendingRows, "wait", noted("exchanged", wait))
        patch.setattr(run.engine, "query", noted("queries", query))
        run.engine.moco.train()
        train_step(run, next(run.loader(STEPS)))
    return run.inputs.overlap, happened


def test_no_exchange_is_under_way_while_spanning_groups_talk(
    tiny_shards: Path, tmp_path: Path
) -> None:
    flags = flags_of(tiny_shards, tmp_path, "--symmetric")
    for overlap, happened in run_ranks(order_of_messages, 2, [*flags, "--bn-group-size", "8"]):
        assert not overlap
        assert happened == ["exchanged", "exchanged", "queries"]
    for overlap, happened in run_ranks(order_of_messages, 2, flags):
        assert overlap
        assert happened == ["queries", "exchanged", "exchanged"]


def overlap_without_order(flags: list[str]) -> list[tuple[bool, list[str]]]:
    """Return `overlap` and the notes, where NCCL keeps the order and where it does not."""
    results = []
    for kept in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "launches_in_order", lambda kept=kept: kept)
            run = Run(command_line.parse(flags))
            results.append((run.inputs.overlap, run.engine.notes))
    collectives.barrier()  # rank 0 keeps the store where groups are made
    return results


def test_engines_with_communicators_of_their_own_need_nccls_order(
    tiny_shards: Path, tmp_path: Path
) -> None:
    flags = flags_of(tiny_shards, tmp_path, "--engine", "fsdp")
    for kept, not_kept in run_ranks(overlap_without_order, 2, [*flags, "--fsdp-shard-size", "1"]):
        assert kept == (True, [])
        assert not not_kept[0]
        assert "NCCL_LAUNCH_ORDER_IMPLICIT" in not_kept[1][0]
    for results in run_ranks(overlap_without_order, 2, flags):
        assert results == [(True, []), (True, [])]


@pytest.mark.parametrize(
    ("version", "value", "kept"),
    [((2, 30, 7), "1", True), ((2, 30, 7), "0", False), ((2, 25, 1), "1", False)],
)
def test_whether_nccls_order_is_kept(
    version: tuple[int, ...], value: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collectives.launches_in_order()  # one process
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    assert collectives.launches_in_order()  # over gloo
    monkeypatch.setattr(collectives, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    monkeypatch.delenv(collectives.LAUNCH_ORDER, raising=False)
    assert not collectives.launches_in_order()
    monkeypatch.setenv(collectives.LAUNCH_ORDER, value)
    assert collectives.launches_in_order() is kept


def trained_on_a_gpu(flags: list[str], ahead: bool) -> dict[str, Tensor]:
    """Weights, statistics and queue after a few steps."""
    run = started(flags, ahead)
    run.engine.moco.train()
    for batch in run.inputs.ahead(run.loader(STEPS)):
        train_step(run, batch)
        run.step += 1
    torch.cuda.synchronize()
    return {n: t.cpu() for n, t in run.engine.moco.state_dict().items()} | {
        "keys": run.queue.keys.cpu()
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--compile", "--aug", "v2"),
        ("--model", "vit_small", "--image-size", "32", "--precision", "bf16", "--aug", "v2"),
    ],
    ids=["plain", "compiled", "transformer"],
)
def test_steps_on_a_gpu_are_the_same_to_the_bit(
    tiny_shards: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    flags = flags_of(tiny_shards, tmp_path, "--device", "cuda", *more)
    (usual,), (ahead,), (again,) = (
        run_ranks(trained_on_a_gpu, 1, flags, way, device="cuda", timeout=500.0)
        for way in (False, True, True)
    )
    for name, wanted in usual.items():
        assert torch.equal(ahead[name], wanted), name
        assert torch.equal(again[name], wanted), name
