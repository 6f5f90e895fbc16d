"""Orders across passes: epochs of any length, and several sets mixed by weights.

Each set is read in passes, one after another without a gap, every pass in its own order: no sample
is read again before all others were. An epoch takes the next samples of each set, a fixed number,
and shuffles the sets (not the samples of one set) among each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moco_scale.data.sampling.order import Indices, Order, Samples
from moco_scale.data.sampling.random import permutation
from moco_scale.utils.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Samples of several sets, numbered one set after the other.

    Attributes:
        parts: an order of each set; its epochs are the passes.
        weights: share of each in an epoch, in any unit.
        epoch_samples: of all together.
        seed: of the shuffling, and of random numbers drawn for a sample.

    Raises:
        UserError: An epoch has no sample of one of the sets.
    """

    parts: tuple[Order, ...]
    weights: tuple[float, ...]
    epoch_samples: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.shares) < 1:
            raise UserError(
                f"an epoch of {self.epoch_samples} samples has none of set "
                f"{self.shares.index(min(self.shares)) + 1} of the mixture, whose weight is "
                f"{min(self.weights):g}; raise it or --samples-per-epoch, or leave the set out"
            )

    @property
    def num_samples(self) -> int:
        """Samples of all sets."""
        return sum(part.num_samples for part in self.parts)

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples of each set in every epoch, rounded by largest remainders."""
        exact = np.array(self.weights) / sum(self.weights) * self.epoch_samples
        shares = np.floor(exact + 1e-9).astype(np.int64)
        missing = self.epoch_samples - int(shares.sum())
        shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
        return tuple(shares.tolist())

    def epoch(self, number: int) -> Samples:
        """Mix the samples of one epoch."""
        return _mixed(self, number)


@lru_cache(maxsize=2)
def _mixed(mixture: Mixture, number: int) -> Samples:
    shares = mixture.shares
    taken = [
        _taken(part, share * number, share)
        for part, share in zip(mixture.parts, shares, strict=True)
    ]
    if len(taken) == 1:
        return taken[0]
    index = np.empty(mixture.epoch_samples, dtype=np.int64)
    passes = np.empty(mixture.epoch_samples, dtype=np.int64)
    chosen = _shuffled(shares, mixture.seed, number)
    first = 0
    for i, (part, samples) in enumerate(zip(mixture.parts, taken, strict=True)):
        places = np.flatnonzero(chosen == i)
        index[places], passes[places] = samples.index + first, samples.passes
        first += part.num_samples
    index.setflags(write=False)
    passes.setflags(write=False)
    return Samples(index, passes)


def _shuffled(shares: tuple[int, ...], seed: int, number: int) -> npt.NDArray[np.int64]:
    """Shuffle the sets: int64 [sum(shares)] with set i shares[i] times."""
    order = permutation(sum(shares), seed, "mixture", number)
    return np.searchsorted(np.cumsum(shares), order, side="right")


def _taken(part: Order, start: int, count: int) -> Samples:
    """Take `count` samples of the set's passes from `start` on."""
    n = part.num_samples
    indices: list[Indices] = []
    passes: list[Indices] = []
    at = start
    while at < start + count:
        number, offset = divmod(at, n)
        stop = min(n, offset + start + count - at)
        indices.append(part.epoch(number).index[offset:stop])
        passes.append(np.full(stop - offset, number, dtype=np.int64))
        at += stop - offset
    return Samples(np.concatenate(indices), np.concatenate(passes))


def in_whole_batches(order: Order, global_batch: int, samples_per_epoch: int = 0) -> Order:
    """Cut the order's epochs to whole batches.

    Args:
        order: of the data set.
        global_batch: samples of a batch.
        samples_per_epoch: length of an epoch; the next one continues where it ends. 0: an order by
            passes stays as it is, a mixture keeps its length.

    Raises:
        UserError: `samples_per_epoch` is less than one batch.
    """
    if not samples_per_epoch and not isinstance(order, Mixture):
        return order
    if 0 < samples_per_epoch < global_batch:
        raise UserError(
            f"--samples-per-epoch {samples_per_epoch} is less than one global batch of "
            f"{global_batch}; raise it, or lower --batch-size"
        )
    samples = samples_per_epoch or order.epoch_samples
    samples = max(samples - samples % max(global_batch, 1), min(samples, global_batch))
    if isinstance(order, Mixture):
        return replace(order, epoch_samples=samples)
    return Mixture((order,), (1.0,), samples, order.seed)
