"""Order of an epoch, and the plan of a run's batches.

An order is a function of (seed, epoch), a global batch a function of the order and the step, and a
rank's share a contiguous slice of it. So a position in a run is one number, the samples consumed,
whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moco_scale.data.sampling.random import permutation
from moco_scale.utils.errors import UserError

Indices = npt.NDArray[np.int64]


class Samples(NamedTuple):
    """Samples in reading order."""

    index: Indices  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    """int64 [n], places in the data set."""
    passes: Indices
    """int64 [n], how often the data set was gone through before: what is drawn at random for a
    sample is a function of its place and this number."""

    def part(self, start: int, stop: int) -> Samples:
        """Slice from `start` to `stop` - 1; views, not copies."""
        return Samples(self.index[start:stop], self.passes[start:stop])


class Order(Protocol):
    """Reading order of a data set."""

    @property
    def num_samples(self) -> int:
        """Samples in the data set; indices are below this number."""
        ...

    @property
    def epoch_samples(self) -> int:
        """Samples that an epoch reads."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the order and of random numbers drawn for a sample."""
        ...

    def epoch(self, number: int) -> Samples:
        """Order all samples of one epoch: a function of the fields and `number`.

        It is called for each batch: cache an expensive order.
        """
        ...


@dataclass(frozen=True)
class FullPermutation:
    """Order of epochs that are one pass each, in a random order of their own."""

    num_samples: int
    seed: int

    @property
    def epoch_samples(self) -> int:
        """All samples."""
        return self.num_samples

    def epoch(self, number: int) -> Samples:
        """Permute all samples."""
        return _full_permutation(self.num_samples, self.seed, number)


@lru_cache(maxsize=2)
def _full_permutation(num_samples: int, seed: int, number: int) -> Samples:
    order = permutation(num_samples, seed, "epoch order", number)
    order.setflags(write=False)
    return Samples(order, np.broadcast_to(np.int64(number), len(order)))


class Plan(Protocol):
    """Samples of each step, of some ranks together."""

    def batch(self, step: int) -> Samples:
        """List the step's samples, in no particular order."""
        ...


@dataclass(frozen=True)
class Slices:
    """Contiguous ranges of a data set, each read in order, several in parallel."""

    stretches: tuple[range, ...]
    batch_size: int

    def __len__(self) -> int:
        """Steps of the longest range."""
        return max(-(-len(stretch) // self.batch_size) for stretch in self.stretches)

    def batch(self, step: int) -> Samples:
        """Slice each range."""
        now = slice(step * self.batch_size, (step + 1) * self.batch_size)
        index = np.concatenate([np.asarray(s[now], dtype=np.int64) for s in self.stretches])
        return Samples(index, np.zeros_like(index))


@dataclass(frozen=True)
class BatchPlan:
    """Plan of the global batches of a run.

    An epoch has as many steps as there are whole global batches; the remaining samples, others in
    each epoch, are dropped.

    Raises:
        UserError: There is not one whole batch.
    """

    order: Order
    global_batch: int

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UserError(f"the global batch size must be positive, not {self.global_batch}")
        if self.order.epoch_samples < self.global_batch:
            raise UserError(
                f"{self.order.epoch_samples} samples do not fill one global batch of "
                f"{self.global_batch}; lower --batch-size or add images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.order.epoch_samples // self.global_batch

    def epoch_of(self, step: int) -> int:
        """Epoch of a step."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Samples:
        """Return the global batch of `step` (counted over the whole run): G samples."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch
        return self.order.epoch(epoch).part(start, start + self.global_batch)

    def share(self, step: int, rank: int, world: int) -> Samples:
        """Return the slice of the global batch of one rank: G / world samples."""
        self.check_world(world)
        share = self.global_batch // world
        return self.batch(step).part(rank * share, (rank + 1) * share)

    def check_world(self, world: int) -> None:
        """Check that the global batch divides by the processes. Raises UserError."""
        if self.global_batch % world:
            raise UserError(
                f"the global batch of {self.global_batch} cannot be shared equally among {world} "
                f"processes; choose a --batch-size that is a multiple of {world}"
            )
