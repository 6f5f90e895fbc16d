"""Replacements of images that cannot be decoded.

A replacement is a function of (seed, pass, sample), as a crop is. So every rank keeps its number of
samples, and any number of ranks and workers gives the same batches.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moco_scale.data.images.bad_image import only_zeros
from moco_scale.data.sampling.random import uniforms
from moco_scale.data.shards.protocols import Images
from moco_scale.untrusted.bad_sample import NAME_CHARACTERS
from moco_scale.utils.text import printable

POLICIES = ("error", "skip")
"""An image that cannot be decoded ends the run (error), or is replaced by another (skip)."""

TRIES = 64
_NEAREST = 64  # the first tries are this near: as a rule in the same shard, which is at hand
_VIEW = 2**16 - 1  # a stream of random numbers that no view of a sample uses


class BadSample(NamedTuple):
    """Image that cannot be decoded."""

    sample: int
    shard: str  # this, key and reason are fit to be shown
    key: str  # "" where the header before the image cannot be read either
    reason: str
    replacement: int
    """The sample that replaces it; -1: none, it is skipped."""


def substitutes(seed: int, passes: int, sample: int, num_samples: int) -> Iterator[int]:
    """Yield replacements of a bad sample to try, nearby ones first: TRIES at most."""
    if num_samples < 2:
        return
    names = np.array([sample], dtype=np.int64)
    numbers = uniforms(seed, np.array([passes], dtype=np.int64), names, _VIEW, TRIES)[0]
    for attempt, number in enumerate(numbers.tolist()):
        near = min(num_samples - 1, _NEAREST << attempt)
        distance = 1 + int(number * near)
        # On both sides alike; the set is a ring.
        yield (sample + (distance + 1) // 2 * (1 if distance % 2 else -1)) % num_samples


def how_to_check(shards: Images) -> str:
    """Advise how to check a set with many bad images."""
    commands = [
        f"`python -m moco_scale shard --check {shlex.quote(folder)}`"
        for folder in shards.checkable()
    ]
    if not commands:
        return (
            "`python -m moco_scale shard --check DIR` says what is wrong with a folder, or with a "
            "copy of one; put damaged shards right where they come from"
        )
    return f"See what is wrong with {' and '.join(commands)} and copy damaged shards again"


def bad_sample(shards: Images, sample: int, reason: str, replacement: int = -1) -> BadSample:
    """Make the record of an image that cannot be decoded."""
    place = shards.place(sample)
    data = shards.read(sample)
    if only_zeros(data):
        reason = "nothing but zeros, as a copy that was cut short may leave"
    shard, key = printable(place.shard, NAME_CHARACTERS), printable(place.key, NAME_CHARACTERS)
    return BadSample(sample, shard, key, printable(reason), replacement)
