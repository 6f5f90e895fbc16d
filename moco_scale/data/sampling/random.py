"""Random numbers as pure functions of their names.

Nothing in a run draws from a generator with a state. A number is computed from its name, such as
(seed, epoch, sample, view), so that it does not matter which process computes it, in which order,
or how often. The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), vectorised over samples.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox-4x32-10 of counters.

    Args:
        counter: four 32-bit words along the last axis, held in uint64.
        key: two 32-bit words.

    Returns:
        An array of the counter's shape, each word below 2**32.
    """
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is in [0, 2**64), not {seed}")
    return seed


def uniforms(
    seed: int,
    epoch: int | npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    view: int,
    count: int,
) -> npt.NDArray[np.float64]:
    """Draw uniform numbers in [0, 1) for each sample: float64 [len(samples), count].

    Row i is a function of (seed, epoch, samples[i], view), and its first n numbers do not depend on
    `count`. Key: the two halves of the seed. Counter: (block | view << 16, low half of the sample,
    high half of the sample, epoch), so no two names share a number. Each number is a 32-bit word
    times 2**-32.

    Args:
        seed: of the run.
        epoch: one number, or one for each sample.
        samples: their indices.
        view: of the samples.
        count: numbers of each sample.
    """
    _checked_seed(seed)
    epochs = np.asarray(epoch, dtype=np.int64)
    if not 0 <= view < 2**16 or bool(((epochs < 0) | (epochs >= 2**32)).any()):
        raise ValueError(f"view {view} or epoch {epoch} is out of range")
    blocks = -(-count // 4)
    if blocks > 2**16:
        raise ValueError(f"{count} numbers for one view are too many")
    names = np.asarray(samples, dtype=np.int64).astype(np.uint64)
    counter = np.empty((len(names), blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64) | np.uint64(view << 16)
    counter[..., 1] = (names & _LOW)[:, None]
    counter[..., 2] = (names >> _SHIFT)[:, None]
    counter[..., 3] = epochs.astype(np.uint64)[..., None]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words.reshape(len(names), blocks * 4)[:, :count] * np.float64(2.0**-32)


def permutation(n: int, seed: int, stream: str, number: int) -> npt.NDArray[np.int64]:
    """Permute range(n), int64 [n]: a function of (n, seed, stream, number).

    Item i gets the i-th of the `raw_words` of that name, with the low n.bit_length() bits replaced
    by i, and the items are sorted by these words: sorting words is some ten times faster than a
    stable argsort.
    """
    low = np.uint64((1 << n.bit_length()) - 1)
    words = raw_words(n, seed, stream, number)  # and changed in place: an epoch's are 10 MB
    words &= ~low
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= low
    return words.view(np.int64)


def raw_words(n: int, seed: int, stream: str, number: int) -> Words:
    """Draw the first n 64-bit words of the generator of a name, uint64 [n].

    The words are those of numpy's Philox (4x64-10). Its 128-bit key is the seed in the low half and
    blake2b(stream, 8 bytes, little-endian) in the high half, and its 256-bit counter starts at
    number * 2**192. Raw words, because numpy keeps bit generators stable over its versions, but not
    the numbers that `Generator` derives from them.

    Args:
        n: number of words.
        seed: of the run.
        stream: a purpose ("epoch order", "shuffle").
        number: which one (an epoch, a step).
    """
    purpose = int.from_bytes(blake2b(stream.encode(), digest_size=8).digest(), "little")
    bits = np.random.Philox(key=_checked_seed(seed) | purpose << 64, counter=number << 192)
    return np.asarray(bits.random_raw(n), dtype=np.uint64)
