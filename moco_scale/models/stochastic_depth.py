"""Stochastic depth whose decisions belong to images (Huang et al. 2016).

Which residual branches an image skips is a function of what names its crop (seed, sample, passes
over the data before, view) and of the layer. An image skips the same ones on any number of ranks,
in any micro-batch, at any place of a shuffled batch, and when a block is computed again.

Whoever gives images to an encoder in training names them by :func:`encoding`;
:meth:`Encoder.start_pass` then draws for the pass that comes next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from moco_scale.data.sampling.order import Samples
from moco_scale.data.sampling.random import uniforms
from moco_scale.utils.to_device import on_device

_STREAM = 1 << 14  # of random numbers: no crop and no augmentation has such a view


class Crops(NamedTuple):
    """Crops that an encoder is about to see.

    Attributes:
        seed: of the run.
        samples: this rank's, of all micro-batches, in the order in which they are encoded.
        views: of each of them, one after the other.
    """

    seed: int
    samples: Samples
    views: tuple[int, ...]


_crops: Crops | None = None


@contextlib.contextmanager
def encoding(crops: Crops) -> Iterator[None]:
    """Name the crops that are encoded within."""
    global _crops
    before, _crops = _crops, crops
    try:
        yield
    finally:
        _crops = before


class StochasticDepth(torchvision.ops.StochasticDepth):
    """Stochastic depth of torchvision's mode ``"row"``, without its draws.

    Attributes:
        factors: fp32 [B], of each image's branch: 0, or 1 / (1 - p). One tensor attribute, so that
            compiled blocks with different p are one graph.
    """

    factors: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same; rows multiplied by their factors."""
        if not self.training:
            return x
        if self.factors is None:
            raise RuntimeError("stochastic depth before Encoder.start_pass has drawn for the pass")
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def draw(
    layers: Sequence[StochasticDepth],
    device: torch.device,
    micro_batch: int,
    micro_batches: int,
    view: int,
) -> None:
    """Draw for one view of a micro-batch of the named crops.

    Args:
        layers: of the encoder, in their order.
        device: that it computes on.
        micro_batch: of the step, from 0.
        micro_batches: of a step; they are equally large.
        view: which of the named views, from 0.
    """
    if _crops is None:
        raise RuntimeError("stochastic depth draws for crops, which `encoding` names")
    size = len(_crops.samples.index) // micro_batches
    samples = _crops.samples.part(micro_batch * size, (micro_batch + 1) * size)
    stream = _STREAM + _crops.views[view]
    numbers = uniforms(_crops.seed, samples.passes, samples.index, stream, len(layers))
    rates = np.array([layer.p for layer in layers])
    factors = np.where(numbers < rates, 0.0, 1 / np.maximum(1 - rates, 2**-32))
    rows = on_device(np.ascontiguousarray(factors.T, dtype=np.float32), device)
    for layer, row in zip(layers, rows.unbind(), strict=True):
        layer.factors = row


def repeating(layers: Sequence[StochasticDepth]) -> contextlib.AbstractContextManager[None]:
    """Decide within as layers would now, whatever they draw for until then."""
    return _deciding(layers, [layer.factors for layer in layers])


@contextlib.contextmanager
def _deciding(
    layers: Sequence[StochasticDepth], factors: Sequence[Tensor | None]
) -> Iterator[None]:
    before = [layer.factors for layer in layers]
    try:
        for layer, now in zip(layers, factors, strict=True):
            layer.factors = now
        yield
    finally:
        for layer, then in zip(layers, before, strict=True):
            layer.factors = then
