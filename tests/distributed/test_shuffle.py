"""ShuffleBN by all-to-all against indexing the whole batch in one process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY
from harness import run_ranks
from torch import Tensor

from moco_scale.checkpoints.state import save_state
from moco_scale.config import command_line
from moco_scale.data.sampling.random import permutation
from moco_scale.distributed import collectives
from moco_scale.methods.key_queue import KeyQueue
from moco_scale.methods.shuffle_bn import ShuffleBN
from moco_scale.training.run import Run
from moco_scale.utils.errors import UserError

BATCH, SEED, STEPS = 16, 5, 4
SHAPE = (3, 4, 4)
LENGTH = 23  # of the queue: neither a multiple nor a divisor of the batch


def global_crops(step: int) -> Tensor:
    """uint8 [16, 3, 4, 4]; no two crops are alike."""
    generator = torch.Generator().manual_seed(step)
    crops = torch.randint(0, 256, (BATCH, *SHAPE), generator=generator, dtype=torch.uint8)
    crops[:, 0, 0, 0] = torch.arange(BATCH)
    return crops


def encode(crops: Tensor) -> Tensor:
    """Any function of a crop alone: fp32 [B, 2]."""
    flat = crops.flatten(1).float()
    return torch.stack([flat[:, 0], flat.sum(1)], 1)


def watch_messages() -> list[dict[str, Any]]:
    """Record what is handed to the all-to-all, without touching it."""
    sent: list[dict[str, Any]] = []
    real = collectives.dist.all_to_all_single

    def watched(
        out: Tensor, rows: Tensor, receive: list[int], send: list[int], **options: Any
    ) -> Any:
        sent.append(
            {
                "send": list(send),
                "receive": list(receive),
                "bytes": rows.numel() * rows.element_size(),
                "dtype": rows.dtype,
                "async": options.get("async_op", False),
            }
        )
        return real(out, rows, receive, send, **options)

    collectives.dist.all_to_all_single = watched  # type: ignore[assignment]
    return sent


def one_rank(mode: str, group: int = 0) -> dict[str, Any]:
    rank, world = collectives.rank(), collectives.world_size()
    per_rank = BATCH // world
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    sent = watch_messages()
    shuffle = ShuffleBN(BATCH, SEED, mode, group)
    queue = KeyQueue(LENGTH, 2, SEED, "cpu")
    received, positions, restored = [], [], []
    for step in range(STEPS):
        crops = global_crops(step)[mine].contiguous()
        before = crops.clone()
        # Two exchanges at once, as a symmetric loss has them.
        exchanges = [shuffle.send(crops, step, stream) for stream in (0, 1)]
        arrived = [exchange.wait() for exchange in exchanges]
        keys = [e.gather_back(encode(a)) for e, a in zip(exchanges, arrived, strict=True)]
        for k in keys:
            queue.enqueue(k)
        assert torch.equal(crops, before)
        received.append(arrived)
        positions.append([e.received for e in exchanges])
        restored.append(keys)
    return {
        "received": received,
        "positions": positions,
        "restored": restored,
        "queue": (queue.keys, queue.pointer),
        "sent": sent,
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(one_rank, request.param, "world")


Ranks = list[dict[str, Any]]


def order(step: int, stream: int) -> list[int]:
    return permutation(BATCH, SEED, f"shuffle-{stream}", step).tolist()


def test_each_rank_encodes_its_slice_of_the_permuted_batch(ranks: Ranks) -> None:
    per_rank = BATCH // len(ranks)
    for rank, results in enumerate(ranks):
        for step in range(STEPS):
            for stream in (0, 1):
                expected = order(step, stream)[rank * per_rank : (rank + 1) * per_rank]
                assert results["positions"][step][stream].tolist() == expected
                got = results["received"][step][stream]
                assert got.dtype == torch.uint8
                assert torch.equal(got, global_crops(step)[expected])


def test_features_come_back_in_the_order_of_the_global_batch(ranks: Ranks) -> None:
    for results in ranks:
        for step in range(STEPS):
            for restored in results["restored"][step]:
                assert torch.equal(restored, encode(global_crops(step)))


def test_every_rank_has_the_queue_of_one_process(ranks: Ranks) -> None:
    expected = KeyQueue(LENGTH, 2, SEED, "cpu")
    for step in range(STEPS):
        for _ in (0, 1):
            expected.enqueue(encode(global_crops(step)))
    for results in ranks:
        keys, pointer = results["queue"]
        assert torch.equal(keys, expected.keys)
        assert pointer == expected.pointer


def test_a_rank_sends_its_own_crops_once_as_bytes(ranks: Ranks) -> None:
    world = len(ranks)
    for results in ranks:
        messages = results["sent"]
        assert len(messages) == (2 * STEPS if world > 1 else 0)
        for message in messages:
            assert sum(message["send"]) == sum(message["receive"]) == BATCH // world
            assert message["bytes"] == BATCH // world * 3 * 4 * 4
            assert message["dtype"] == torch.uint8
            assert message["async"] is True
    # What one sends to another is what that one expects.
    for i in range(len(ranks[0]["sent"])):
        for a in range(world):
            for b in range(world):
                assert ranks[a]["sent"][i]["send"][b] == ranks[b]["sent"][i]["receive"][a]
    if world > 1:
        assert any(len(set(m["send"])) > 1 for results in ranks for m in results["sent"])


def test_permutations_differ_between_steps_and_between_exchanges_of_a_step() -> None:
    orders = {tuple(order(step, stream)) for step in range(STEPS) for stream in (0, 1)}
    assert len(orders) == 2 * STEPS
    shuffle = ShuffleBN(BATCH, SEED)
    assert shuffle.permutation(2, 1).tolist() == order(2, 1)
    assert ShuffleBN(BATCH, SEED + 1).permutation(2, 1).tolist() != order(2, 1)


def test_off_keeps_every_crop_where_it_is() -> None:
    world = 2
    per_rank = BATCH // world
    for rank, results in enumerate(run_ranks(one_rank, world, "off")):
        assert results["sent"] == []
        mine = list(range(rank * per_rank, (rank + 1) * per_rank))
        for step in range(STEPS):
            for stream in (0, 1):
                assert results["positions"][step][stream].tolist() == mine
                assert torch.equal(results["received"][step][stream], global_crops(step)[mine])
                assert torch.equal(results["restored"][step][stream], encode(global_crops(step)))


@pytest.mark.parametrize(("world", "group"), [(1, 8), (4, 8), (2, 4), (4, 16)])
def test_node_shuffles_inside_each_group_and_sends_nothing_out_of_it(
    world: int, group: int
) -> None:
    per_rank, groups = BATCH // world, BATCH // group
    for rank, results in enumerate(run_ranks(one_rank, world, "node", group)):
        own_group = range(rank * per_rank // group * group, (rank + 1) * per_rank + group - 1)
        for step in range(STEPS):
            for stream in (0, 1):
                expected = [
                    i * group + sample
                    for i in range(groups)
                    for sample in permutation(group, SEED, f"shuffle-{stream}", step * groups + i)
                ][rank * per_rank : (rank + 1) * per_rank]
                assert results["positions"][step][stream].tolist() == expected
                assert set(expected) <= set(own_group)
                assert torch.equal(results["received"][step][stream], global_crops(step)[expected])
                assert torch.equal(results["restored"][step][stream], encode(global_crops(step)))
        if group <= per_rank:
            assert results["sent"] == []
        for message in results["sent"]:
            for other in range(world):
                assert message["send"][other] == 0 or other * per_rank in own_group


def test_a_node_of_the_whole_batch_is_the_world() -> None:
    for step in range(STEPS):
        whole = ShuffleBN(BATCH, SEED, "node", BATCH).permutation(step, 1)
        assert whole.tolist() == order(step, 1)


def start_with(flags: list[str], local: int) -> tuple[int, str]:
    """The group a run begins with on hosts of so many ranks, or why it does not; it saves."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    try:
        run = Run(command_line.parse(flags))
    except UserError as error:
        return 0, str(error)
    assert run.shuffle.group == run.config.contrast.shuffle_group
    if run.resumed_from is None:
        save_state(run, epoch_done=False)
        run.folder.finish_saving()
    return run.shuffle.group, ""


def test_the_group_is_that_of_a_node_where_the_run_began(tiny_shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--bn-group-size", "2", "--shuffle-bn", "node", "--data-dir", str(tiny_shards)]
    flags += ["--output-dir", str(tmp_path)]
    assert run_ranks(start_with, 4, flags, 2) == [(4, "")] * 4
    # On one host it goes on with that number, and refuses another.
    assert run_ranks(start_with, 1, flags, 1) == [(4, "")]
    ((group, why),) = run_ranks(start_with, 1, [*flags, "--shuffle-group", "8"], 1)
    assert group == 0 and "--shuffle-group: 4 in the run, 8 now" in why


def test_a_node_with_one_group_of_batchnorm_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--shuffle-bn", "node", "--data-dir", str(tiny_shards)]
    flags += ["--output-dir", str(tmp_path)]
    for group, why in run_ranks(start_with, 2, flags, 1):
        assert group == 0 and "that is one BatchNorm group" in why
