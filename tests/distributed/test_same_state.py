"""Ranks that have come apart are named, with what they differ in."""

import pytest
import torch
from harness import run_ranks

from moco_scale.distributed import collectives
from moco_scale.distributed.same_state import differences, require_same_state, sampled_hash
from moco_scale.utils.errors import PeerLost

HOSTS = ["a", "a", "b", "b"]


def test_the_rank_that_differs_from_most_is_named() -> None:
    table = [[7, 96, 5], [7, 96, 5], [7, 64, 5], [7, 96, 9]]
    assert differences(table, ["step", "queue pointer", "weights"], HOSTS) == [
        "queue pointer: rank 2 on b has 64 (most have 96)",
        "weights: rank 3 on b has 9 (most have 5)",
    ]


def test_when_there_is_no_majority_all_are_named() -> None:
    assert differences([[1], [2]], ["step"], HOSTS) == [
        "step: rank 0 on a has 1, rank 1 on a has 2"
    ]
    many = [[rank] for rank in range(40)]
    (text,) = differences(many, ["step"], ["host"] * 40)
    assert text.endswith("rank 5 on host has 5 and 34 more")


def test_every_element_counts_within_as_many_turns_as_are_needed() -> None:
    tensors = [torch.randn(5), torch.randn(1000), torch.randn(64, 3, 3), torch.ones(300).bfloat16()]
    turns = range(16)  # 1000 elements, of which 64 are looked at
    before = [int(sampled_hash(tensors, turn)) for turn in turns]
    for tensor in tensors:
        flat = tensor.view(-1)
        for i in (0, len(flat) // 2, len(flat) - 1):
            kept, flat[i] = flat[i].clone(), flat[i] * 1.01
            after = [int(sampled_hash(tensors, turn)) for turn in turns]
            assert after != before
            flat[i] = kept
    assert [int(sampled_hash(tensors, turn)) for turn in turns] == before


def test_the_same_numbers_in_another_order_are_others() -> None:
    numbers = torch.randn(64)
    assert int(sampled_hash([numbers], 0)) != int(sampled_hash([numbers.flip(0)], 0))


def compare(strayed: int) -> str:
    rank = collectives.rank()
    weights = torch.ones(10) + (rank == strayed)
    try:
        require_same_state({"step": 5, "weights": sampled_hash([weights], 0)}, 5)
    except PeerLost as lost:
        return str(lost)
    return ""


@pytest.mark.parametrize("strayed", [2, 9])
def test_ranks_find_out_together(strayed: int) -> None:
    said = run_ranks(compare, 3, strayed)
    assert said[0] == said[1] == said[2]
    assert ("weights: rank 2 on " in said[0]) == (strayed == 2)
    assert "step:" not in said[0]
