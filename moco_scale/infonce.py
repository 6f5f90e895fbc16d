"""InfoNCE against a queue, without logits of size N x K and without a copy of the queue."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of one block of logits: it should stay in a CPU's cache, and a GPU needs it large.
_BLOCK_CPU = 1 << 19
_BLOCK_GPU = 1 << 24
# exp(-2 / T) must stay a normal fp32 number, because no maximum is subtracted.
MIN_TEMPERATURE = 0.025


class Contrast(NamedTuple):
    """What InfoNCE says of each query.

    Attributes:
        loss: fp32 [N], differentiable with respect to the queries.
        positive_probability: fp32 [N], softmax weight of the positive key; no gradient.
    """

    loss: Tensor
    positive_probability: Tensor


def infonce(query: Tensor, positive: Tensor, queue: Tensor, temperature: float) -> Contrast:
    """Cross entropy of each query's positive key against itself and all keys of the queue.

    van den Oord et al. 2018; He et al. 2020, eq. 1. Unit vectors have no logit above 1/T, so
    that 1/T serves as the softmax's offset and one pass over the queue gives the sum of
    exponentials and the gradient together. Computed in fp32, outside of any autocast.

    Args:
        query: fp32 [N, D], unit rows.
        positive: fp32 [N, D], unit rows, no gradient flows to it.
        queue: fp32 [K, D], unit rows; must not change before backward has run.
        temperature: T, at least :data:`MIN_TEMPERATURE`.

    Raises:
        ValueError: the temperature is too small for fp32.
    """
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature {temperature} is below {MIN_TEMPERATURE}")
    with torch.autocast(query.device.type, enabled=False):
        loss, probability = _InfoNCE.apply(
            query.float(), positive.detach().float(), queue, temperature
        )
    return Contrast(loss, probability)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, positive: Tensor, queue: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        positive_logit = ((query * positive).sum(1) - 1) / temperature
        positive_exp = positive_logit.exp()
        negatives = torch.zeros_like(positive_exp)
        weighted_keys = torch.zeros_like(query)
        block = _BLOCK_CPU if query.device.type == "cpu" else _BLOCK_GPU
        scaled_query = query / temperature
        for keys in queue.split(max(block // max(query.shape[0], 1), 256)):
            exps = (scaled_query @ keys.T).sub_(1 / temperature).exp_()
            negatives += exps.sum(1)
            weighted_keys.addmm_(exps, keys)
        total = negatives + positive_exp
        # The positive's weight, its softmax - 1, is -negatives / total: near a softmax of 1 the
        # subtraction would cancel every digit.
        weighted_keys.sub_(negatives[:, None] * positive)
        gradient = weighted_keys.div_(total[:, None] * temperature)
        probability = positive_exp / total
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(probability)
        return total.log() - positive_logit, probability

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None
