"""Numbers that depend on their names alone."""

import hashlib

import numpy as np
import pytest

from moco_scale.data.sampling.random import permutation, philox4x32, uniforms

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: str
) -> None:
    got = philox4x32(np.array([counter, counter], dtype=np.uint64), key)
    for row in got:
        assert " ".join(f"{word:08x}" for word in row) == words


def scalar_uniform(seed: int, epoch: int, sample: int, view: int, slot: int) -> float:
    """The documented number, worked out with Python integers."""
    c = [slot // 4 | view << 16, sample & 0xFFFFFFFF, sample >> 32, epoch]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[slot % 4] / 2**32


def test_uniforms_are_the_documented_function_of_their_names() -> None:
    seed, epoch, view = 2**63 + 12345, 71, 1
    samples = np.array([0, 5, 2**32 + 5, 2**40 + 1])
    got = uniforms(seed, epoch, samples, view, 10)
    assert got.shape == (4, 10)
    assert got.dtype == np.float64
    for row, sample in zip(got, samples.tolist(), strict=True):
        for slot, number in enumerate(row):
            assert number == scalar_uniform(seed, epoch, sample, view, slot)


def test_a_samples_numbers_depend_neither_on_the_others_nor_on_the_count() -> None:
    everyone = uniforms(3, 2, np.arange(50), 0, 32)
    alone = uniforms(3, 2, np.array([17]), 0, 5)
    assert np.array_equal(everyone[17, :5], alone[0])
    assert uniforms(3, 2, np.array([], dtype=np.int64), 0, 32).shape == (0, 32)


def test_every_name_has_numbers_of_its_own() -> None:
    samples = np.arange(20)
    drawn = [
        uniforms(seed, epoch, samples, view, 32)
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
        for view in (0, 1)
    ]
    numbers = np.concatenate([block.ravel() for block in drawn])
    assert len(np.unique(numbers)) == len(numbers)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    numbers = uniforms(0, 0, np.arange(20_000), 0, 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.01  # five standard deviations
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size
    assert np.abs(counts - 0.05).max() < 0.003
    correlation = np.corrcoef(numbers, rowvar=False) - np.eye(8)
    assert np.abs(correlation).max() < 0.04
    neighbours = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    assert abs(neighbours) < 0.04


@pytest.mark.parametrize(
    ("seed", "epoch", "view"), [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, 2**16)]
)
def test_names_out_of_range_are_refused(seed: int, epoch: int, view: int) -> None:
    with pytest.raises(ValueError, match=r"seed|range"):
        uniforms(seed, epoch, np.arange(3), view, 4)


def test_permutation_is_the_documented_one() -> None:
    n, seed, stream, number = 1000, 2**60 + 7, "epoch order", 9
    key = seed + (
        int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little") << 64
    )
    words = np.random.Philox(key=key, counter=number * 2**192).random_raw(n).tolist()
    bits = n.bit_length()
    order = [i for _, i in sorted((word >> bits, i) for i, word in enumerate(words))]
    assert permutation(n, seed, stream, number).tolist() == order


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 63, 64, 65, 1000])
def test_permutation_has_every_item_once(n: int) -> None:
    order = permutation(n, 0, "x", 0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutations_of_other_names_are_unrelated() -> None:
    n = 2000
    names = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (2**32, "a", 0)]
    orders = [permutation(n, seed, stream, number) for seed, stream, number in names]
    for i, first in enumerate(orders):
        assert np.array_equal(first, permutation(n, *names[i]))
        for second in [*orders[i + 1 :], np.arange(n)]:
            assert (first == second).sum() < 10  # one fixed point is expected
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.12


def test_each_place_is_as_likely_for_each_item() -> None:
    counts = np.zeros((4, 4))
    for number in range(4000):
        counts[permutation(4, 5, "fair", number), np.arange(4)] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 0.035  # five standard deviations
