"""The order for shards that have to be fetched."""

import pickle

import numpy as np
import pytest

from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.sampling.windows import WindowedPermutation, order_of

UNEVEN = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 60, 40))


def order(window: int = 8, seed: int = 3) -> WindowedPermutation:
    return WindowedPermutation(UNEVEN, window, seed)


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own() -> None:
    first, second = order().epoch(0).index, order().epoch(1).index
    for read in (first, second):
        assert np.array_equal(np.sort(read), np.arange(len(UNEVEN)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order(seed=4).epoch(0).index)
    assert not np.array_equal(first, order(window=9).epoch(0).index)


def test_it_is_a_function_of_its_name_and_not_of_what_was_asked_before() -> None:
    asked = order()
    for number in (5, 0, 1, 0, 7):
        assert np.array_equal(asked.epoch(number).index, order().epoch(number).index)
        assert (asked.epoch(number).passes == number).all()
    copied = pickle.loads(pickle.dumps(asked))
    assert np.array_equal(copied.epoch(2).index, order().epoch(2).index)


def test_the_order_is_the_documented_one() -> None:
    """Worked out with Python's fractions of unlimited size."""
    from fractions import Fraction

    from moco_scale.data.sampling.random import permutation, raw_words

    window, seed, epoch = 8, 3, 2
    places = {int(s): p for p, s in enumerate(permutation(40, seed, "shard order", epoch))}
    words = raw_words(len(UNEVEN), seed, "place in the window", epoch)
    times = [
        ((places[int(shard)] + window * Fraction(int(word), 2**64)) % 40, i)
        for i, (shard, word) in enumerate(zip(UNEVEN, words, strict=True))
    ]
    assert order().epoch(epoch).index.tolist() == [i for _, i in sorted(times)]


def test_no_more_shards_than_the_window_are_in_use_at_any_time() -> None:
    read = UNEVEN[order(window=8).epoch(0).index]
    n = len(read)
    in_use = np.zeros(n, dtype=int)
    for shard in range(40):
        places = np.flatnonzero(read == shard)
        gaps = np.diff(places, append=places[0] + n)  # the circle closes
        last = int(gaps.argmax())
        first = places[(last + 1) % len(places)]
        in_use[(first + np.arange((places[last] - first) % n + 1)) % n] += 1
    assert in_use.max() <= 8
    assert in_use.mean() > 6


def test_samples_that_are_left_out_belong_to_no_shard_in_particular() -> None:
    subset = UNEVEN[UNEVEN % 3 == 0]
    read = WindowedPermutation(subset, 4, 0).epoch(0).index
    assert np.array_equal(np.sort(read), np.arange(len(subset)))


def test_where_the_window_holds_everything_the_order_is_the_full_one() -> None:
    for window in (0, 40, 64):
        chosen = order_of(UNEVEN, window, 3)
        assert chosen == FullPermutation(len(UNEVEN), 3)
    assert isinstance(order_of(UNEVEN, 39, 3), WindowedPermutation)
    for window in (0, 40):
        with pytest.raises(ValueError, match="a window of"):
            WindowedPermutation(UNEVEN, window, 3)


def test_any_number_of_ranks_sees_the_same_global_batches() -> None:
    plan = BatchPlan(order(), 24)
    for step in range(2 * plan.steps_per_epoch):
        whole = plan.batch(step).index
        for world in (1, 2, 4, 8):
            shares = [plan.share(step, rank, world).index for rank in range(world)]
            assert np.array_equal(np.concatenate(shares), whole)


def test_a_large_set_fits_the_words() -> None:
    shard_of = np.repeat(np.arange(10_000), 100)
    plan = WindowedPermutation(shard_of, 64, 0)
    read = plan.epoch(0).index
    assert np.array_equal(np.sort(read), np.arange(len(shard_of)))
    # Steady mixture: as many different shards in a stretch at the start, middle and end.
    for start in (0, 500_000, 999_000):
        assert 60 <= len(np.unique(shard_of[read[start : start + 1000]])) <= 90
