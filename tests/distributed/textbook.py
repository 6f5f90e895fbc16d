"""Momentum contrast as its papers write it: one process, plain PyTorch, nothing clever.

The yardstick for the real thing, so it shares no code with it. Each piece is the most direct
transcription there is: BatchNorm groups by a loop, ShuffleBN by indexing, the queue one key at a
time, logits concatenated, an average parameter by parameter.

He et al. 2020, Momentum Contrast, algorithm 1 and section 3.3; Chen et al. 2020, Improved
Baselines with Momentum Contrastive Learning.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
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


class LoopBatchNorm(nn.BatchNorm2d):
    """Each group of consecutive samples by itself; running statistics take the groups' mean."""

    group_size = 1

    def forward(self, x: Tensor) -> Tensor:
        assert self.training and self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        outputs, means, variances = [], [], []
        for start in range(0, len(x), self.group_size):
            group = x[start : start + self.group_size]
            mean = group.mean((0, 2, 3), keepdim=True)
            variance = ((group - mean) ** 2).mean((0, 2, 3), keepdim=True)
            normalised = (group - mean) / torch.sqrt(variance + self.eps)
            outputs.append(normalised * self.weight[:, None, None] + self.bias[:, None, None])
            count = group.numel() // group.shape[1]
            means.append(mean.detach().flatten())
            variances.append(variance.detach().flatten() * count / (count - 1))
        self.running_mean.mul_(0.9).add_(0.1 * torch.stack(means).mean(0))
        self.running_var.mul_(0.9).add_(0.1 * torch.stack(variances).mean(0))
        self.num_batches_tracked += 1
        return torch.cat(outputs)


def make_network(dim: int, head: str, bn_group_size: int) -> nn.Module:
    """torchvision's ResNet-18; its ``fc`` is the head, ``"linear"`` (v1) or ``"mlp"`` (v2)."""
    network = torchvision.models.resnet18(num_classes=dim, norm_layer=LoopBatchNorm)
    if head == "mlp":
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), network.fc)
    for module in network.modules():
        if isinstance(module, LoopBatchNorm):
            module.group_size = bn_group_size
    return network


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


class Textbook:
    """Query, key, queue and the step."""

    def __init__(self, query: nn.Module, queue: Tensor, settings: Settings) -> None:
        self.settings = settings
        self.query, self.key = query, copy.deepcopy(query)
        self.queue = queue.clone()
        self.images = [-1] * len(queue)  # of each key; -1: a random one of the beginning
        self.next_slot = 0
        self.optimizer = torch.optim.SGD(
            query.parameters(),
            lr=0.0,
            momentum=settings.sgd_momentum,
            weight_decay=settings.weight_decay,
        )

    def step(
        self,
        samples: Sequence[int],
        views: Sequence[Tensor],
        shuffles: Sequence[Sequence[int]],
        learning_rate: float,
    ) -> float:
        """One step on a batch of two views, [B, 3, S, S] each; the loss before the update.

        ``samples``: the images.
        ``shuffles``: for each key view (the second; then, if symmetric, the first) the sample at
        each shuffled position.
        """
        pairs = [(0, 1), (1, 0)] if self.settings.symmetric else [(0, 1)]
        queries = [F.normalize(self.query(views[q]), dim=1) for q, _ in pairs]
        all_keys = [
            self._keys(views[k], shuffle) for (_, k), shuffle in zip(pairs, shuffles, strict=True)
        ]
        loss = sum(
            (self._loss(q, k, samples) for q, k in zip(queries, all_keys, strict=True)),
            torch.zeros(()),
        )
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            m = self.settings.key_momentum
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                key.copy_(m * key + (1 - m) * query)
        for keys in all_keys:
            for key_row, sample in zip(keys, samples, strict=True):
                self.queue[self.next_slot] = key_row
                self.images[self.next_slot] = sample
                self.next_slot = (self.next_slot + 1) % len(self.queue)
        return loss.item()

    @torch.no_grad()
    def _keys(self, view: Tensor, shuffle: Sequence[int]) -> Tensor:
        shuffled = F.normalize(self.key(view[list(shuffle)]), dim=1)
        keys = torch.empty_like(shuffled)
        for position, sample in enumerate(shuffle):
            keys[sample] = shuffled[position]
        return keys

    def _loss(self, queries: Tensor, keys: Tensor, samples: Sequence[int]) -> Tensor:
        positive = torch.einsum("nd,nd->n", queries, keys)[:, None]
        negative = torch.einsum("nd,kd->nk", queries, self.queue.clone())
        images, own = torch.tensor(self.images), torch.tensor(samples)
        if self.settings.mask_unfilled:
            negative = negative.masked_fill(images == -1, -math.inf)
        if self.settings.mask_same_image:
            negative = negative.masked_fill(images == own[:, None], -math.inf)
        logits = torch.cat([positive, negative], dim=1) / self.settings.temperature
        return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long))
