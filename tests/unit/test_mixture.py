"""Epochs of any length and mixtures: exact shares, whole passes, draws of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import make_shards
from conftest import write_image

from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading.loader import pretraining_loader
from moco_scale.data.open import data_set, open_shards
from moco_scale.data.sampling.mixture import Mixture, in_whole_batches
from moco_scale.data.sampling.order import BatchPlan, FullPermutation, Order
from moco_scale.data.shards.mixed_shards import MixedShards, epoch_notes, split_mixture
from moco_scale.utils.errors import UserError


def mixture(sizes: list[int], weights: list[float], epoch: int, seed: int = 3) -> Mixture:
    parts = tuple(FullPermutation(n, seed + i) for i, n in enumerate(sizes))
    return Mixture(parts, tuple(weights), epoch, seed)


def streams(order: Order, sizes: list[int], epochs: int) -> list[list[tuple[int, int]]]:
    """(place in the set, pass) of each set's samples, in the order in which they are read."""
    ends = np.cumsum(sizes)
    found: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for number in range(epochs):
        for index, passes in zip(*map(np.ndarray.tolist, order.epoch(number)), strict=True):
            part = int(np.searchsorted(ends, index, side="right"))
            found[part].append((index - int(ends[part]) + sizes[part], passes))
    return found


@pytest.mark.parametrize(
    ("weights", "epoch", "shares"),
    [
        ([0.7, 0.3], 10, (7, 3)),
        ([7, 3], 101, (71, 30)),
        ([1, 1, 1], 8, (3, 3, 2)),
        ([0.1, 0.2, 0.7], 1000, (100, 200, 700)),
    ],
)
def test_shares_are_exact(weights: list[float], epoch: int, shares: tuple[int, ...]) -> None:
    order = mixture([5] * len(weights), weights, epoch)
    assert order.shares == shares
    for number in range(3):
        sets = order.epoch(number).index // 5
        assert np.bincount(sets, minlength=len(weights)).tolist() == list(shares)


def test_a_set_is_gone_through_before_any_of_its_samples_is_repeated() -> None:
    sizes = [20, 7]
    order = mixture(sizes, [0.4, 0.6], 25)  # 10 and 15 an epoch: half a pass, two and a bit
    for n, seed, read in zip(sizes, (3, 4), streams(order, sizes, 6), strict=True):
        for number in range(len(read) // n):
            passes = read[n * number : n * (number + 1)]
            assert [p for _, p in passes] == [number] * n
            expected = FullPermutation(n, seed).epoch(number).index
            assert [sample for sample, _ in passes] == expected.tolist()
    # No sample is ever named twice with the same number: its draws are its own.
    names = {(s, p) for number in range(6) for s, p in zip(*order.epoch(number), strict=True)}
    assert len(names) == 6 * 25


def test_sets_are_shuffled_among_each_other() -> None:
    order = mixture([500, 500], [1, 1], 1000)
    first, second = (order.epoch(number).index < 500 for number in (0, 1))
    assert not np.array_equal(first, second)
    for sets in (first, second):
        in_batches = sets.reshape(-1, 50).sum(1)
        assert 10 < in_batches.min() < 25 < in_batches.max() < 40
    assert not np.array_equal(first, mixture([500, 500], [1, 1], 1000, seed=9).epoch(0).index < 500)


def test_an_epoch_of_any_length_goes_on_where_the_last_one_ended() -> None:
    order = in_whole_batches(FullPermutation(10, 1), 4, samples_per_epoch=26)
    assert order.epoch_samples == 24  # whole batches: nothing is dropped
    (read,) = streams(order, [10], 5)
    assert len(read) == 120
    for number in range(12):
        expected = FullPermutation(10, 1).epoch(number).index.tolist()
        assert read[10 * number : 10 * number + 10] == [(s, number) for s in expected]


def test_without_a_length_an_epoch_is_a_pass() -> None:
    order = FullPermutation(10, 1)
    assert in_whole_batches(order, 4) is order
    with pytest.raises(UserError, match="--samples-per-epoch 3 is less than one global batch of 4"):
        in_whole_batches(order, 4, samples_per_epoch=3)
    with pytest.raises(UserError, match=r"3 samples do not fill .* add images"):
        BatchPlan(in_whole_batches(FullPermutation(3, 1), 4), 4)


def test_a_set_without_a_sample_in_an_epoch_is_named() -> None:
    with pytest.raises(UserError, match=r"none of set 2 of the mixture, whose weight is 0\.001"):
        mixture([5, 5], [1, 0.001], 10)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("A", [("A", None)]),
        ("A,B", [("A", None), ("B", None)]),
        ("~/A,~/B", [(f"{Path.home()}/A", None), (f"{Path.home()}/B", None)]),
        ("A:0.7, B:.3", [("A", 0.7), ("B", 0.3)]),
        ("d/{a,b}-{0..9}.tar:2,B:1e-1", [("d/{a,b}-{0..9}.tar", 2.0), ("B", 0.1)]),
        ("s3://x/y:3,http://h:80,B", None),
        ("http://h:80,B", [("http://h:80", None), ("B", None)]),
        ("pipe:cat a,b", None),
        ("A:1,pipe:cat a:1", None),
        ("", None),
        ("A:0.7,B", None),
        ("A:0,B:1", None),
        ("A:1e999,B:1", None),
        ("A:1e-300,B:1", None),
        ("A,,B", None),
    ],
)
def test_names_of_mixtures(spec: str, expected: list[tuple[str, float | None]] | None) -> None:
    if expected is None:
        with pytest.raises(UserError, match="--data-dir"):
            split_mixture(spec)
    else:
        assert [tuple(named) for named in split_mixture(spec)] == expected


def test_what_exists_under_a_name_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "c:2"):
        (tmp_path / name).mkdir()
    assert [tuple(n) for n in split_mixture("a,b")] == [("a,b", None)]
    assert [tuple(n) for n in split_mixture("c:2")] == [("c:2", None)]
    assert [tuple(n) for n in split_mixture("c:2:5,d:1")] == [("c:2", 5.0), ("d", 1.0)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """12 training images of two classes with val, 5 of the same classes, and 7 unlabelled."""
    root = tmp_path_factory.mktemp("sets")
    seed = 0
    for name, folders, count in (
        ("one", ("train/ash", "train/oak", "val/ash", "val/oak"), 6),
        ("two", ("train/ash", "train/oak"), 3),
        ("three", ("",), 7),
    ):
        for folder in folders:
            for i in range(count):
                seed += 1
                write_image(root / name / folder / f"{i}.jpg", seed=seed)
    return [make_shards(root / name, root / f"{name}-shards") for name in ("one", "two", "three")]


def test_a_mixture_reads_its_sets(sets: list[Path]) -> None:
    one, two, three = (open_shards(path, "train") for path in sets)
    both = open_shards(f"{sets[0]}:3,{sets[1]}:1", "train")
    assert len(both) == len(one) + len(two) == 18
    assert both.classes == ["ash", "oak"]
    assert both.labels.tolist() == [*one.labels.tolist(), *two.labels.tolist()]
    assert [bytes(both.read(i)) for i in (11, 12)] == [bytes(one.read(11)), bytes(two.read(0))]
    assert both.where(13) == f"{sets[1]}, {two.where(1)}"
    assert both.place(13).key == two.place(1).key
    assert both.fault(13) is None
    with pytest.raises(IndexError):
        both.read(18)
    chosen = both.subset(np.array([17, 3, 12])).subset(np.array([2, 0]))
    assert bytes(chosen.read(0)) == bytes(two.read(0))
    assert chosen.labels.tolist() == [both.labels[12], both.labels[17]]
    assert sorted(chosen.order(0).epoch(0).index.tolist()) == [0, 1]
    val = open_shards(f"{sets[0]}:3,{sets[1]}:1", "val")
    assert len(val) == 12
    other = open_shards(f"{sets[0]},{sets[2]}", "train")
    assert other.classes == []
    assert other.labels.tolist() == [-1] * 19
    assert torch.tensor(other.labels).tolist() == [-1] * 19
    assert "val" in data_set(f"{sets[2]},{sets[0]}").splits
    assert "val" not in data_set(f"{sets[2]},{sets[1]}").splits
    with pytest.raises(UserError, match="no split 'val'"):
        open_shards(f"{sets[2]},{sets[1]}", "val")
    assert isinstance(three.order(0), FullPermutation)


def test_weights_are_part_of_what_a_resumed_run_checks(sets: list[Path]) -> None:
    def fingerprint(*weights: Any) -> str:
        spec = ",".join(f"{path}{weight}" for path, weight in zip(sets[:2], weights, strict=True))
        return open_shards(spec, "train").fingerprint

    assert fingerprint(":3", ":1") == fingerprint(":6", ":2") != fingerprint(":1", ":3")
    assert fingerprint("", "") == fingerprint(":12", ":6")


def test_a_sample_seen_twice_in_an_epoch_has_other_crops(sets: list[Path]) -> None:
    shards = open_shards(f"{sets[0]}:0.5,{sets[1]}:0.5", "train")
    assert isinstance(shards, MixedShards)
    order = in_whole_batches(shards.order(0), 8, 32)
    plan = BatchPlan(order, 8)
    assert plan.steps_per_epoch == 4
    (note,) = epoch_notes(shards, order)
    assert f"16 of the 12 images in {sets[0]}, 16 of the 6 images in {sets[1]};" in note
    assert epoch_notes(shards.parts[0], shards.parts[0].order(0)) == []
    crops: dict[int, list[bytes]] = {}
    with pretraining_loader(
        shards, plan, AUGMENTATIONS["cifar"], 16, num_workers=0, end_step=4
    ) as loader:
        for batch in loader:
            assert batch.epoch == 0
            for i, sample in enumerate(batch.index.tolist()):
                crops.setdefault(sample, []).append(batch.views[:, i].numpy().tobytes())
    assert sorted(crops) == list(range(18))
    twice = [seen for sample, seen in crops.items() if sample >= 12]  # 16 reads of 6
    assert {len(seen) for seen in twice} == {2, 3}
    assert all(len(set(seen)) == len(seen) for seen in twice)
