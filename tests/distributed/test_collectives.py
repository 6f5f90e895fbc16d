"""Each helper on several processes against what one process would have."""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor

from moco_scale.config import command_line
from moco_scale.distributed import collectives, consensus
from moco_scale.engines import make_engine
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import build_encoder
from moco_scale.utils.errors import PeerLost, RankError, UserError
from moco_scale.utils.progress import on_progress, progressed

ROWS = [[3, 1, 2, 4], [0, 2, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]]


def rows_of(rank: int, count: int) -> Tensor:
    return torch.arange(count * 2, dtype=torch.int64).view(count, 2) + 100 * rank


def gathers() -> dict[str, Any]:
    rank, world = collectives.rank(), collectives.world_size()
    even = rows_of(rank, 3)
    # Column slices are not contiguous.
    results: dict[str, Any] = {
        "even": collectives.all_gather_rows(even),
        "slice": collectives.all_gather_rows(even.float()[:, 1:]),
        "bytes": collectives.all_gather_rows(even.to(torch.uint8)),
        "shared out": collectives.reduce_scatter_rows(rows_of(rank, 2 * world).float()),
        "per node": collectives.ranks_per_node(),
        "identity": (rank, world, collectives.is_main(), collectives.local_rank()),
    }
    results["uneven"] = [
        collectives.all_gather_uneven_rows(rows_of(rank, counts[rank])) for counts in ROWS
    ]
    collectives.barrier()
    return results


FAILING = [(), (0,), (1,), (1, 0)]


def mixed_tensors(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(2, 3, generator=generator),
        torch.randn((), generator=generator),
        torch.tensor(rank),
        torch.randn(0, 4, generator=generator),
        torch.randn(3, 2, generator=generator).T,
        torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn(5, generator=generator).requires_grad_(),
        torch.randn(6, generator=generator).bfloat16(),
    ]


def averages() -> tuple[list[Tensor], list[bool]]:
    tensors = mixed_tensors(collectives.rank())
    before = [(t.data_ptr(), t.stride()) for t in tensors]
    collectives.average_(tensors)
    collectives.average_([])
    collectives.average_(tensors[2:3])
    in_place = [(t.data_ptr(), t.stride()) == b for t, b in zip(tensors, before, strict=True)]
    return [t.detach() for t in tensors], in_place


def sums_and_broadcasts() -> tuple[Tensor, list[Tensor], Any]:
    rank = collectives.rank()
    total = torch.tensor([1.0, 10.0**rank], dtype=torch.float64)
    assert collectives.sum_(total) is total
    tensors = [torch.full((2,), float(rank)), torch.tensor(rank)]
    collectives.broadcast_(tensors)
    return total, tensors, collectives.broadcast_object({"rank": rank, "path": None})


def errors() -> list[str | None]:
    rank, found = collectives.rank(), []
    for failing in FAILING:
        error = consensus.first_error(
            UserError(f"rank {rank} says so") if rank in failing else None
        )
        assert error is None or type(error) is UserError
        found.append(None if error is None else str(error))
    return found


def fail_on_the_last() -> int:
    if collectives.rank() == collectives.world_size() - 1:
        raise UserError("a defect of one rank")
    return collectives.rank()


def fail_as_main() -> None:
    raise UserError("a defect of rank 0")


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


def agreement() -> dict[str, Any]:
    rank = collectives.rank()
    results = {
        "agreed": consensus.raise_on_all_ranks(lambda: 10 * rank),
        "gathered": collectives.gather_objects(f"of rank {rank}"),
        "broadcast_from_main": consensus.broadcast_from_main(
            lambda: f"of rank {collectives.rank()}"
        ),
        "one_failed": message(lambda: consensus.raise_on_all_ranks(fail_on_the_last)),
        "main_failed": message(lambda: consensus.broadcast_from_main(fail_as_main)),
    }
    return results


def blocks() -> dict[int, tuple[Tensor, float]]:
    rank, world = collectives.rank(), collectives.world_size()
    results: dict[int, tuple[Tensor, float]] = {}
    for size in (1, 2, 4):
        if world == 1 or size > world:
            continue
        group = collectives.neighbours(size)
        assert group.size == size
        stacked = collectives.gather_stack(torch.tensor([rank, 10 * rank]), group)
        total = collectives.sum_(torch.tensor(float(rank)), group.handle).item()
        results[size] = stacked, total
    with pytest.raises(ValueError, match=f"blocks of 3 ranks do not tile {world} ranks"):
        collectives.neighbours(3)
    return results


def hosts() -> tuple[int, float, list[int]]:
    """Size of this host's group, the sum of its ranks, and what an exchange within it brings."""
    rank = collectives.rank()
    with pytest.MonkeyPatch.context() as patch:  # ranks take turns, as srun may deal them out
        patch.setattr(socket, "gethostname", lambda: f"host-{rank % 2}")
        group = collectives.host_group()
    total = collectives.sum_(torch.tensor(float(rank)), group.handle).item()
    ones, rows = [1] * group.size, torch.full((group.size, 1), rank)
    got = collectives.start_exchange_rows(rows, ones, ones, group).wait()
    return group.size, total, got[:, 0].tolist()


def exchange() -> Tensor:
    """Rank r sends the number r * 10 + destination in (r + destination) % 3 rows."""
    rank, world = collectives.rank(), collectives.world_size()
    send = [(rank + to) % 3 for to in range(world)]
    receive = [(source + rank) % 3 for source in range(world)]
    values = torch.tensor([rank * 10 + to for to in range(world)], dtype=torch.uint8)
    rows = values.repeat_interleave(torch.tensor(send))[:, None].expand(-1, 5)
    pending = collectives.start_exchange_rows(rows, send, receive)
    collectives.barrier()  # other messages may pass while it is under way
    return pending.wait()


def turns() -> tuple[set[int], str]:
    """Which ranks had had their turn before this one, on hosts of two ranks each."""
    rank = collectives.rank()
    folder = Path(collectives.broadcast_object(tempfile.mkdtemp() if rank == 0 else ""))

    told = folder / "told"

    def action() -> set[int]:
        progressed()
        while collectives.world_size() > 1 and not told.exists():  # who waits hears of it
            time.sleep(0.01)
        before = {int(path.name) for path in folder.glob("[0-9]")}
        (folder / str(rank)).touch()
        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank % 2))
        with on_progress(told.touch if rank else lambda: None):
            before = consensus.rank0_first(action)
        failed = message(lambda: consensus.rank0_first(fail_as_main))
    return before, failed


WORK = (gathers, averages, sums_and_broadcasts, errors, agreement, blocks, hosts, exchange, turns)


def everything() -> dict[str, Any]:
    return {function.__name__: function() for function in WORK}


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of 1, 2 or 4 ranks found."""
    return run_ranks(everything, request.param)


Ranks = list[dict[str, Any]]


def test_who_waits_for_a_turn_waits_as_long_as_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten hours in steps of a tenth of what is waited at most, then nothing more."""
    limit = collectives.time_out()
    now, got_on, heard = [0.0], [0], []

    def of_all(mine: torch.Tensor) -> torch.Tensor:
        """With those of another rank, which works."""
        now[0] += limit / 10
        got_on[0] += now[0] < 36_000
        return mine + torch.tensor([now[0] < 40_000, got_on[0], 0])

    def waits(wait: float) -> tuple[bool, int]:
        return False, 0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(collectives, "sum_", of_all)
    with on_progress(lambda: heard.append(now[0])):
        with pytest.raises(PeerLost, match=r"1 rank\(s\) .* not got on"):
            consensus._until_all_are_done(waits)
        last = heard[-1]
        assert last + limit / 10 >= 36_000 and last + limit < now[0] <= last + 1.2 * limit
        assert len(heard) == got_on[0] > 100
        heard.clear()
        monkeypatch.setattr(collectives, "sum_", lambda tensor: tensor)
        consensus._until_all_are_done(waits)
        assert not heard


def test_rows_are_gathered_in_rank_order(ranks: Ranks) -> None:
    world = len(ranks)
    every = torch.cat([rows_of(r, 3) for r in range(world)])
    for rank, results in enumerate(ranks):
        got = results["gathers"]
        assert got["identity"] == (rank, world, rank == 0, rank)
        assert torch.equal(got["even"], every)
        assert torch.equal(got["slice"], every.float()[:, 1:])
        added = torch.stack([rows_of(r, 2 * world) for r in range(world)]).sum(0).float()
        assert torch.equal(got["shared out"], added[2 * rank : 2 * rank + 2])
        assert got["per node"] == world  # all on this host
        assert torch.equal(got["bytes"], every.to(torch.uint8))
        for counts, uneven in zip(ROWS, got["uneven"], strict=True):
            assert torch.equal(uneven, torch.cat([rows_of(r, counts[r]) for r in range(world)]))


def test_means_are_taken_in_place_whatever_the_shapes(ranks: Ranks) -> None:
    inputs = [mixed_tensors(r) for r in range(len(ranks))]
    for rank, results in enumerate(ranks):
        tensors, in_place = results["averages"]
        assert all(in_place)
        for i, got in enumerate(tensors):
            parts = [tensors_of_rank[i].detach() for tensors_of_rank in inputs]
            assert got.dtype == parts[0].dtype
            if not got.is_floating_point():
                assert got.item() == rank  # counters are left alone
                continue
            mean = torch.stack([p.double() for p in parts]).mean(0).to(got.dtype)
            torch.testing.assert_close(got, mean)


def test_sums_and_broadcasts(ranks: Ranks) -> None:
    world = len(ranks)
    for results in ranks:
        total, tensors, value = results["sums_and_broadcasts"]
        assert total.tolist() == [world, sum(10.0**r for r in range(world))]
        assert [t.tolist() for t in tensors] == [[0.0, 0.0], 0]
        assert value == {"rank": 0, "path": None}


def test_all_ranks_stop_for_the_reason_of_the_lowest(ranks: Ranks) -> None:
    expected: list[str | None] = []
    host = socket.gethostname()
    for failing in FAILING:
        lowest = min((r for r in failing if r < len(ranks)), default=None)
        # Rank 0 meets what all meet; any other one's error says where it was.
        place = f"rank {lowest} on {host}: " if lowest else ""
        expected.append(None if lowest is None else f"{place}rank {lowest} says so")
    assert [results["errors"] for results in ranks] == [expected] * len(ranks)


def test_what_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    last, host = len(ranks) - 1, socket.gethostname()
    place = f"rank {last} on {host}: " if last else ""
    for rank, results in enumerate(ranks):
        got = results["agreement"]
        assert got["agreed"] == 10 * rank
        assert got["broadcast_from_main"] == "of rank 0"
        assert got["one_failed"] == f"{place}a defect of one rank"
        assert got["main_failed"] == "a defect of rank 0"
        assert got["gathered"] == [f"of rank {r}" for r in range(last + 1)]


def test_turns_are_taken_by_rank_0_then_one_of_each_host_then_the_others(ranks: Ranks) -> None:
    first, leaders = {0}, {rank for rank in range(len(ranks)) if rank % 2 == 0}
    for rank, results in enumerate(ranks):
        before, failed = results["turns"]
        expected = set() if rank == 0 else first if rank in leaders else leaders
        assert before >= expected
        assert before.isdisjoint(leaders - expected)
        assert failed == "a defect of rank 0"


def test_one_process_has_one_turn() -> None:
    taken: list[int] = []

    def action() -> str:
        taken.append(1)
        return "done"

    assert consensus.rank0_first(action) == "done"
    assert taken == [1]


def test_one_process_keeps_its_own_error() -> None:
    error = RankError(UserError("an image"), 0)
    assert consensus.first_error(error) is error
    assert consensus.first_error(None) is None


def test_neighbours_share_a_block(ranks: Ranks) -> None:
    for rank, results in enumerate(ranks):
        assert list(results["blocks"]) == {1: [], 2: [1, 2], 4: [1, 2, 4]}[len(ranks)]
        for size, (stacked, total) in results["blocks"].items():
            start = rank // size * size
            members = range(start, start + size)
            assert stacked.tolist() == [[r, 10 * r] for r in members]
            assert total == sum(members)


def test_a_host_s_ranks_are_a_group(ranks: Ranks) -> None:
    for rank, results in enumerate(ranks):
        mine = list(range(rank % 2, len(ranks), 2))
        assert results["hosts"] == (len(mine), sum(mine), mine)


def test_rows_are_exchanged_in_uneven_numbers(ranks: Ranks) -> None:
    world = len(ranks)
    for rank, results in enumerate(ranks):
        got = results["exchange"]
        assert got.dtype == torch.uint8 and got.shape[1] == 5
        expected = [[s * 10 + rank] * 5 for s in range(world) for _ in range((s + rank) % 3)]
        assert got.tolist() == expected


def test_one_process_needs_no_group() -> None:
    assert collectives.world_size() == 1 and collectives.rank() == 0 and collectives.is_main()
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(collectives.all_gather_rows(rows), rows)
    assert torch.equal(collectives.all_gather_uneven_rows(rows), rows)
    assert torch.equal(collectives.start_exchange_rows(rows, [3], [3]).wait(), rows)
    assert collectives.sum_(rows.clone()).equal(rows)
    assert collectives.broadcast_object("x") == "x"
    means = torch.ones(2)
    collectives.average_([means])
    collectives.broadcast_([means])
    collectives.barrier()
    collectives.shutdown()
    assert means.tolist() == [1, 1]


def blocks_in_turn() -> list[float]:
    """The second block is made when the first one is done with its own."""
    turn, rank = collectives.side_store("turn"), collectives.rank()
    if rank >= 2:
        turn.get("0")  # waits for it
    group = collectives.neighbours(2)
    found = collectives.sum_(torch.full((1,), float(rank)), group.handle).tolist()
    if rank == 0:
        turn.set("0", "done")
    return found


def test_a_block_waits_for_its_own_ranks_alone() -> None:
    assert run_ranks(blocks_in_turn, 4, timeout=60) == [[1.0], [1.0], [5.0], [5.0]]


def engine_groups(flags: tuple[str, ...]) -> list[bool]:
    """Whether each group that there is has the time-out of this program."""
    from torch.distributed import distributed_c10d

    collectives._timeout = timedelta(seconds=1234)
    small = ["--dataset", "cifar10", "--batch-size", "8", "--bn-group-size", "2"]
    config = command_line.parse([*small, *flags])
    moco = MoCo(build_encoder("resnet18", stem="cifar", dim=8, image_size=8))
    make_engine(config, moco, torch.device("cpu"))
    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    return [backend.options._timeout == timedelta(seconds=1234) for backend in backends]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (4, ("--engine", "fsdp", "--fsdp-shard-size", "2")),
        (2, ("--deepspeed", "ds_configs/zero1.json")),
    ],
    ids=["fsdp", "zero1"],
)
def test_an_engine_s_own_groups_wait_as_long_as_ours(world: int, flags: tuple[str, ...]) -> None:
    for found in run_ranks(engine_groups, world, flags):
        assert len(found) > 1 and all(found)


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Nothing that a launcher sets but these; what is added to it goes with the test."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launchers and "SLURM" not in k}
    monkeypatch.setattr(os, "environ", kept | values)


def test_slurm_tasks_without_an_address_are_told_what_to_export(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment(monkeypatch, SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_NTASKS="2")
    with pytest.raises(UserError, match="export MASTER_ADDR="):
        collectives.initialize("cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        collectives.initialize("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(monkeypatch, LOCAL_RANK="2", RANK="6", WORLD_SIZE="8")
    with pytest.raises(RankError, match=r"rank 6 .*: local rank 2 has no GPU of its own"):
        collectives.initialize("cuda")
