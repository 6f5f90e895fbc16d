"""Windowed order for remote shards: samples are mixed in a window that rolls over the shards.

A full permutation needs every shard at any time. Here only `window` shards are needed at a time,
one leaving as the next enters, so that shards can be fetched ahead and deleted behind.

The shards of an epoch stand in a circle, in a random order of their own. Sample i of the shard at
place p is read at the time p + u_i (mod shards), with u_i uniform in [0, window). So at any time
just the last `window` places are in use, all equally: a batch has the same mixture everywhere in
the epoch. Since the circle closes, the epoch begins with the samples of the last places that are
not read at its end, and those window - 1 shards are needed twice.

Blocks of `window` shards, permuted one after another, would mix as well inside a block, but at each
change they need two blocks at once, or stall.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moco_scale.data.sampling.mixture import Mixture
from moco_scale.data.sampling.order import FullPermutation, Indices, Order, Samples
from moco_scale.data.sampling.random import permutation, raw_words

REMOTE_WINDOW = 64
"""Shards in the window of a data set that has to be fetched, unless the user says otherwise."""


class WindowedPermutation:
    """Order of epochs that are one pass each, reading `window` shards at a time.

    Args:
        shard_of: unsigned or signed integers [N], the shard of each sample.
        window: shards; at least 1 and fewer than there are.
        seed: of the order and of random numbers drawn for a sample.
    """

    def __init__(self, shard_of: npt.NDArray[np.integer], window: int, seed: int) -> None:
        # Places are given to the shards that hold samples: a subset may leave some empty.
        used, compact = np.unique(shard_of, return_inverse=True)
        if not 1 <= window < len(used):
            raise ValueError(f"a window of {window} of {len(used)} shards")
        self.window, self.seed = window, seed
        self.num_shards = len(used)
        self._shard_of = compact.astype(np.uint32)
        self._kept: dict[int, Samples] = {}

    @property
    def num_samples(self) -> int:
        return len(self._shard_of)

    @property
    def epoch_samples(self) -> int:
        return len(self._shard_of)

    def epoch(self, number: int) -> Samples:
        kept = self._kept.get(number)
        if kept is None:
            kept = Samples(self._indices(number), np.broadcast_to(np.int64(number), len(self)))
            # The next epoch is asked for while this one is still read.
            self._kept = {n: s for n, s in self._kept.items() if n == number - 1} | {number: kept}
        return kept

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": {}}  # cheaper made again than sent

    def _indices(self, number: int) -> Indices:
        """Sort samples by their times.

        Times are fixed-point numbers in the high bits of words whose low bits hold the sample:
        sorting words is fast, and no two are equal.
        """
        n, shards = self.num_samples, self.num_shards
        index_bits = n.bit_length()
        fraction = 64 - index_bits - shards.bit_length()
        place_of = np.empty(shards, dtype=np.uint64)
        place_of[permutation(shards, self.seed, "shard order", number)] = np.arange(shards)
        delay = raw_words(n, self.seed, "place in the window", number) >> np.uint64(64 - fraction)
        times = (place_of << np.uint64(fraction))[self._shard_of] + delay * np.uint64(self.window)
        times %= np.uint64(shards << fraction)
        times <<= np.uint64(index_bits)
        times |= np.arange(n, dtype=np.uint64)
        times.sort()
        order = (times & np.uint64((1 << index_bits) - 1)).astype(np.int64)
        order.setflags(write=False)
        return order


def order_of(shard_of: npt.NDArray[np.integer], window: int, seed: int) -> Order:
    """Choose the order of samples: windowed, or full where that is the same.

    Args:
        shard_of: integers [N], the shard of each sample.
        window: shards; 0, or all shards: a full permutation.
        seed: of the order.
    """
    if window and window < len(np.unique(shard_of)):
        return WindowedPermutation(shard_of, window, seed)
    return FullPermutation(len(shard_of), seed)


def window_of(order: Order) -> int:
    """Shards of a set that an order reads at a time; 0: all."""
    if isinstance(order, Mixture):  # its sets have the same window, or fewer shards
        return max(window_of(part) for part in order.parts)
    return order.window if isinstance(order, WindowedPermutation) else 0
