"""Momentum contrast as its papers write it, for runs of the package to be compared with.

The encoders, BatchNorm groups, ShuffleBN, loss, update and queue are those of
examples/moco_in_one_file.py. Here are the package's documented conventions, each worked out one
item at a time: which samples make a batch, how they are shuffled, the first queue, the schedules,
and the two masks, which no paper has. No code is shared with the package.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from moco_in_one_file import MoCo, make_encoder
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters; ``bn_group_size`` samples of a batch are normalised together."""

    bn_group_size: int
    temperature: float
    key_momentum: float
    sgd_momentum: float
    weight_decay: float
    symmetric: bool = False
    mask_unfilled: bool = False
    mask_same_image: bool = False


def make_network(dim: int, head: str, bn_group_size: int) -> nn.Module:
    """torchvision's ResNet-18; its ``fc`` is the head, ``"linear"`` (v1) or ``"mlp"`` (v2)."""
    return make_encoder(head, bn_group_size, dim, stem="imagenet")


def permutation(n: int, seed: int, stream: str, number: int) -> list[int]:
    """The documented permutation, worked out one item at a time.

    Raw words of numpy's Philox with key (seed, hash of the stream's name) and ``number`` in the
    counter's highest word; the low bits of each word make room for its item; sort.
    """
    purpose = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    key = np.array([seed, int.from_bytes(purpose, "little")], dtype=np.uint64)
    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    shift = n.bit_length()
    return [item for _, item in sorted((int(w) >> shift, i) for i, w in enumerate(words))]


def epoch_batches(samples: int, batch_size: int, seed: int, steps: int) -> list[list[int]]:
    """The samples of each step's batch; what does not fill a batch is dropped in every epoch."""
    per_epoch = samples // batch_size
    batches = []
    for step in range(steps):
        order = permutation(samples, seed, "epoch order", step // per_epoch)
        start = step % per_epoch * batch_size
        batches.append(order[start : start + batch_size])
    return batches


def initial_queue(length: int, dim: int, seed: int) -> Tensor:
    """Random unit vectors, as documented."""
    rows = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def step_schedule(
    base: float, step: int, steps_per_epoch: int, decay_epochs: Sequence[int]
) -> float:
    """v1: a tenth at each of some epochs."""
    for epoch in decay_epochs:
        if step >= epoch * steps_per_epoch:
            base /= 10
    return base


def cosine_schedule(base: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """v2's official code: half a cosine over the run, changed at each epoch."""
    return base / 2 * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs))


class Textbook(MoCo):
    """The step on samples that are known by their numbers, with the masks."""

    def __init__(self, query: nn.Module, queue: Tensor, settings: Settings) -> None:
        super().__init__(
            query,
            queue.clone(),
            temperature=settings.temperature,
            key_momentum=settings.key_momentum,
            sgd_momentum=settings.sgd_momentum,
            weight_decay=settings.weight_decay,
        )
        self.settings = settings
        self.images = torch.full((len(queue),), -1)  # of each key; -1: a random first one
        self.samples = torch.empty(0, dtype=torch.long)

    def step_on(
        self,
        samples: Sequence[int],
        views: Sequence[Tensor],
        shuffles: Sequence[Sequence[int]],
        learning_rate: float,
    ) -> float:
        """Take a :meth:`step` on a batch; ``samples`` are its images."""
        self.samples = torch.tensor(samples)
        return self.step(views, [torch.tensor(shuffle) for shuffle in shuffles], learning_rate)

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        logits = super().logits(queries, keys)
        masked = torch.zeros_like(logits, dtype=torch.bool)
        if self.settings.mask_unfilled:
            masked[:, 1:] |= self.images == -1
        if self.settings.mask_same_image:
            masked[:, 1:] |= self.images == self.samples[:, None]
        return logits.masked_fill(masked, -math.inf)

    def enqueue(self, keys: Tensor) -> None:
        slots = torch.arange(self.next_slot, self.next_slot + len(keys)) % len(self.queue)
        self.images[slots] = self.samples.repeat(len(keys) // len(self.samples))
        super().enqueue(keys)
