"""InfoNCE and its queue as one would write them down: a deque, and a row of logits per query."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """One key: fp32 [D], and its image; -1 of the random keys of the beginning."""

    key: Tensor
    image: int


Ring = deque[Slot]


def new_ring(first_keys: Tensor) -> Ring:
    """A full ring of the random keys, of which the first is replaced first."""
    return deque((Slot(key, -1) for key in first_keys.float()), maxlen=len(first_keys))


def enqueue(ring: Ring, keys: Tensor, images: list[int], dtype: torch.dtype) -> None:
    ring.extend(Slot(k, i) for k, i in zip(keys.to(dtype).float(), images, strict=True))


def loss_and_gradient(
    query: Tensor,
    positive: Tensor,
    images: list[int],
    ring: Ring,
    temperature: float,
    *,
    mask_unfilled: bool = False,
    mask_same_image: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss [N] of each query, and the gradient [N, D] of their sum, in fp64."""
    q = query.detach().double().requires_grad_()
    losses = []
    keys = torch.stack([slot.key for slot in ring]).double() if ring else q.new_empty(0, q.shape[1])
    for row, key, image in zip(q, positive.double(), images, strict=True):
        counts = [
            not (mask_unfilled and slot.image < 0) and not (mask_same_image and slot.image == image)
            for slot in ring
        ]
        logits = torch.cat([key[None], keys[torch.tensor(counts, dtype=torch.bool)]]) @ row
        losses.append(torch.logsumexp(logits / temperature, 0) - logits[0] / temperature)
    loss = torch.stack(losses)
    (gradient,) = torch.autograd.grad(loss.sum(), q)
    return loss.detach(), gradient


def compare(loss: Tensor, gradient: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Within 1e-5; the gradient's scale is that of 1 / T."""
    torch.testing.assert_close(loss.detach().double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-5)
