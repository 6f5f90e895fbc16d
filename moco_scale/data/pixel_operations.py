"""What an augmentation does to pixels, on any device: PIL's operations, batched.

The published recipes run on 8-bit PIL images. Every operation here reproduces PIL's, rounding
included, on float tensors that hold whole numbers from 0 to 255, so that a view's pixels do not
depend on the batch it is computed in.

An operation takes `x`, float32 [n, 3, H, W], which it may change in place, and one row of numbers
for each sample. Products and sums are separate calls on purpose: fused ones round differently in
the vectorised part of a loop and in its rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moco_scale.data.augment import Params

Operation = Callable[[Tensor, Tensor], Tensor]

_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2 in 1/65536; the sums are exact in float32


def normalise_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std for each channel, in place."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].mul_(1 / (255 * s)).add_(-m / s)
    return x


def column(values: Tensor) -> Tensor:
    """The first number of each sample, to go with pixels: [n, 1, 1, 1]."""
    return values[:, 0, None, None, None]


def blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """PIL's Image.blend(base, x, factor): clipped, then cut off, not rounded."""
    return x.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """PIL's convert("L"): [n, 1, H, W]."""
    gray = x[:, 0:1] * _LUMA[0]
    gray.add_(x[:, 1:2] * _LUMA[1]).add_(x[:, 2:3] * _LUMA[2])
    return gray.add_(32768).mul_(1 / 65536).floor_()


def mean_luma(gray: Tensor) -> Tensor:
    """The rounded mean of each picture of :func:`luma`: [n, 1, 1, 1]."""
    # Both sums are exact, in float32 along a row and then in float64: their order does not matter.
    mean = gray.sum(3, keepdim=True).sum(2, keepdim=True, dtype=torch.float64)
    return mean.div_(gray.shape[2] * gray.shape[3]).add_(0.5).floor_().to(gray.dtype)


def grayscale(x: Tensor, values: Tensor) -> Tensor:
    return x.copy_(luma(x).expand_as(x))


def brightness(x: Tensor, factors: Tensor) -> Tensor:
    return x.mul_(column(factors)).clamp_(max=255).floor_()


def contrast(x: Tensor, factors: Tensor) -> Tensor:
    return blend(x, mean_luma(luma(x)), column(factors))


def saturation(x: Tensor, factors: Tensor) -> Tensor:
    return blend(x, luma(x), column(factors))


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue as torchvision does on PIL images: through 8-bit HSV, whose hue has period 256.

    (In 8-bit HSV 255 is a whole turn, so the wrap is off by one step; the published recipes are.)
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    span = value - torch.minimum(torch.minimum(r, g), b)
    saturated = (span * 255).div_(value.clamp(min=1)).floor_().mul_(1 / 255).mul_(value)
    # Hue in sixths of a turn, times the span: 0 at red, 2 at green, 4 at blue.
    sixths = torch.where(g == value, (b - r).add_(span).add_(span), (r - g).add_(span * 4))
    sixths = torch.where(r == value, g - b, sixths)
    span.mul_(6).clamp_(min=1)
    sixths.add_(span * (sixths < 0)).mul_(255).div_(span).floor_()
    sixths.add_(turns.mul(255).trunc_()[:, :, None])
    sixths.sub_((sixths * (1 / 256)).floor_().mul_(256)).mul_(6 / 255)
    value.add_(0.5)
    for channel, centre in enumerate((3, 2, 4)):
        # How much of `saturated` the channel lacks: nothing near its own hue, all of it far away.
        lack = x[:, channel].copy_(sixths).sub_(centre).abs_()
        lack = lack.neg_().add_(2) if channel == 0 else lack.sub_(1)
        lack.clamp_(0, 1).mul_(saturated).neg_().add_(value).floor_()
    return x


_PARTS = 1 << 24  # what weights are given in
# What halves lack (see `blur`): more than what rounding in fp32 adds, and little against a value.
_MISSING = 2.0**-14


def box_reach(sigma: float) -> int:
    """The largest distance of a pixel that has a weight in :func:`box_weights`."""
    return int((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1


def box_weights(sigmas: Params, reach: int | None = None) -> Params:
    """PIL's Gaussian is three box filters in a row, here the box of each: float32 [n, reach + 1].

    Column d is the weight of the pixels at distance d; a sigma of 0 leaves every pixel as it is.
    Without `reach`, it is the one of the largest sigma. The outermost weight is a fraction of the
    inner ones, chosen so that the variance is exact (Gwosdek et al., "Theoretical foundations of
    Gaussian convolution by extended box filtering", SSVM 2011, equations 7, 11 and 14). All are
    whole multiples of 1 / _PARTS, as PIL's are: they add up to 1 or a little less.
    """
    variance = np.asarray(sigmas, dtype=np.float64)[:, None] ** 2 / 3
    inner = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    edge /= 6 * (variance - (inner + 1) ** 2)
    distance = np.arange(int(inner.max(initial=0)) + 2 if reach is None else reach + 1)
    within = np.rint(_PARTS / (2 * (inner + edge) + 1))
    outermost = np.maximum((_PARTS - (2 * inner + 1) * within) // 2, 0)
    weights = within * (distance <= inner) + outermost * (distance == inner + 1)
    return (weights / _PARTS).astype(np.float32)


def blur(x: Tensor, weights: Tensor) -> Tensor:
    """Gaussian blur as in PIL: rounded after each box, the border pixels repeated.

    PIL rounds halves up, but hardly ever has any where its weights add up to less than 1: what
    should be a half is then a little less. At sigma = 1 that is every sixth pixel.
    """
    whole = weights[:, 0] + 2 * weights[:, 1:].sum(1)  # exact: multiples of 1 / _PARTS
    half = torch.where(whole < 1, 0.5 - _MISSING, 0.5)[:, None, None, None]
    for dim in (3, 3, 3, 2, 2, 2):
        x = _box_blur(x, weights[:, :, None, None, None], half, dim)
    return x


def _box_blur(x: Tensor, weights: Tensor, half: Tensor, dim: int) -> Tensor:
    total, length = x * weights[:, 0], x.shape[dim]
    for distance in range(1, weights.shape[1]):
        share, edge = x * weights[:, distance], min(distance, length)
        inside = length - edge
        total.narrow(dim, edge, inside).add_(share.narrow(dim, 0, inside))
        total.narrow(dim, 0, inside).add_(share.narrow(dim, edge, inside))
        total.narrow(dim, 0, edge).add_(share.narrow(dim, 0, 1))
        total.narrow(dim, inside, edge).add_(share.narrow(dim, length - 1, 1))
    return total.add_(half).floor_()


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """PIL's ImageOps.solarize: values from the threshold on are taken from 255."""
    return torch.where(x < column(threshold), x, 255 - x)


def mirror(x: Tensor, values: Tensor) -> Tensor:
    return x.flip(3)
