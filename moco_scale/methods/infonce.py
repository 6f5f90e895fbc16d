"""InfoNCE against a queue, without logits of size N x K and without a copy of the queue."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.distributed import collectives

# Elements of one block of logits: it should stay in a CPU's cache, and a GPU needs it large.
_BLOCK_CPU = 1 << 17
_BLOCK_GPU = 1 << 24
# exp(1 / T), summed over any queue, and exp(-1 / T) must stay normal fp32 numbers, because no
# maximum is subtracted.
MIN_TEMPERATURE = 0.025


class Negatives(NamedTuple):
    """Negative keys.

    Attributes:
        keys: fp32 or bf16 [k, D], unit rows; must not change before the loss is computed.
        samples: int64 [k], their images; None without ``mask_same_image``.
        sharded: every rank has its own, and the negatives are all of them together.
        probed: number of keys, the first ones, that count for ``negative_similarity``.
    """

    keys: Tensor
    samples: Tensor | None = None
    sharded: bool = False
    probed: int = 0


class Contrast(NamedTuple):
    """InfoNCE of each query.

    Attributes:
        loss: fp32 [N], differentiable with respect to the queries.
        positive_probability: fp32 [N], softmax weight of the positive key; no gradient.
        negative_similarity: fp32 [N], mean q·k over the probed negatives; no gradient.
    """

    loss: Tensor
    positive_probability: Tensor
    negative_similarity: Tensor


class Sums(NamedTuple):
    """Sums over some of the negatives; added up over shards they are those of all negatives.

    Attributes:
        weighted: fp32 [N, D], sum over keys of exp(q·k / T) k.
        exps: fp32 [N], sum over keys of exp(q·k / T).
        similar: fp32 [N], sum over probed keys of q·k.
        probed: fp32 [N], how many were probed.
    """

    weighted: Tensor
    exps: Tensor
    similar: Tensor
    probed: Tensor


def infonce(
    query: Tensor,
    positive: Tensor,
    negatives: Negatives,
    temperature: float,
    samples: Tensor | None = None,
) -> Contrast:
    """Cross entropy of each query's positive key against itself and all negatives.

    van den Oord et al. 2018; He et al. 2020, eq. 1. Unit vectors have no logit above 1/T, so the
    softmax needs no maximum, and one pass over the keys gives both the sum of exponentials and the
    gradient. Both are plain sums. Over sharded negatives every rank computes them for all ranks'
    queries (one all-gather), and one reduce-scatter of N x (D + 3) numbers per rank returns each
    its own. Computed in fp32, outside of any autocast.

    Args:
        query: fp32 [N, D], unit rows.
        positive: fp32 [N, D], unit rows, no gradient flows to it.
        negatives: if they are sharded all ranks call this, with the same N.
        temperature: T, at least :data:`MIN_TEMPERATURE`.
        samples: int64 [N], the images of the queries: a key of the same image is no negative.
            Only with ``negatives.samples``.

    Raises:
        ValueError: The temperature is too small for fp32.
    """
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature {temperature} is below {MIN_TEMPERATURE}")
    with torch.autocast(query.device.type, enabled=False):
        return Contrast(
            *_InfoNCE.apply(
                query.float(), positive.detach().float(), negatives, temperature, samples
            )
        )


@torch.no_grad()
def partial_sums(
    scaled: Tensor, negatives: Negatives, temperature: float, samples: Tensor | None
) -> Sums:
    """Sum over this rank's keys, for queries over T, fp32 [N, D]; no messages."""
    keys, probed = negatives.keys, min(negatives.probed, len(negatives.keys))
    exps_sum = scaled.new_zeros(len(scaled))
    weighted = torch.zeros_like(scaled)
    probed_sum = scaled.new_zeros(scaled.shape[1])
    logits = _BLOCK_CPU if scaled.device.type == "cpu" else _BLOCK_GPU
    rows = max(logits // max(len(scaled), 1), 256)

    def add(block: slice) -> None:  # a function, so that a block is freed before the next is made
        some = keys[block].float()
        exps = (scaled @ some.T).exp_()
        if samples is not None and negatives.samples is not None:
            exps.masked_fill_(negatives.samples[block] == samples[:, None], 0.0)
        exps_sum.add_(exps.sum(1))
        weighted.addmm_(exps, some)
        if block.start < probed:
            probed_sum.add_(some[: probed - block.start].sum(0))

    for start in range(0, len(keys), rows):
        add(slice(start, start + rows))
    similar = (scaled @ probed_sum).mul_(temperature)
    return Sums(weighted, exps_sum, similar, scaled.new_full((len(scaled),), probed))


def _sums_over_ranks(
    scaled: Tensor, negatives: Negatives, temperature: float, samples: Tensor | None
) -> Sums:
    every = collectives.all_gather_rows(scaled)
    if samples is not None:
        samples = collectives.all_gather_rows(samples)
    sums = partial_sums(every, negatives, temperature, samples)
    columns = torch.cat([sums.weighted, *(column[:, None] for column in sums[1:])], 1)
    mine = collectives.reduce_scatter_rows(columns)
    return Sums(mine[:, :-3], mine[:, -3], mine[:, -2], mine[:, -1])


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        negatives: Negatives,
        temperature: float,
        samples: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sum_up = _sums_over_ranks if negatives.sharded else partial_sums
        sums = sum_up(query / temperature, negatives, temperature, samples)
        # Log of the negatives' sum over the positive. Everything is a function of it: differences
        # such as softmax - 1 would cancel every digit near a softmax of 1.
        margin = sums.exps.log() - (query * positive).sum(1) / temperature
        # Without a negative the loss is 0, and so is the gradient.
        mean_key = sums.weighted / sums.exps.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        gradient = (mean_key - positive).mul_(margin.sigmoid()[:, None] / temperature)
        probability = (-margin).sigmoid()
        similarity = sums.similar / sums.probed.clamp_min(1)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(probability, similarity)
        return F.softplus(margin), probability, similarity

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None, None
