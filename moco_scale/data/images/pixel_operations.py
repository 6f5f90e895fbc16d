"""Pixel operations of augmentations: PIL's, batched, on any device.

The published recipes run on 8-bit PIL images. Every operation here reproduces PIL's, rounding
included, on float tensors that hold whole numbers from 0 to 255, so that a view's pixels do not
depend on its batch.

An operation takes `x`, float32 [n, 3, H, W], which it may change in place, and one row of numbers
for each sample. Products and sums of fractions are separate calls on purpose: fused ones round
differently in the vectorised body of a loop and in its rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moco_scale.data.images.augment import Params

Operation = Callable[[Tensor, Tensor], Tensor]

_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2 in 1/65536; the sums are exact in float32


def normalise_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute (x / 255 - mean) / std for each channel, in place."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].mul_(1 / (255 * s)).add_(-m / s)
    return x


def column(values: Tensor) -> Tensor:
    """Return the first number of each sample, to broadcast over pixels: [n, 1, 1, 1]."""
    return values[:, 0, None, None, None]


def blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """Blend as PIL's Image.blend(base, x, factor): clipped, then truncated, not rounded."""
    return x.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """Convert as PIL's convert("L"): [n, 1, H, W]."""
    gray = x[:, 0:1] * _LUMA[0]
    gray.add_(x[:, 1:2] * _LUMA[1]).add_(x[:, 2:3] * _LUMA[2])
    return gray.add_(32768).mul_(1 / 65536).floor_()


def mean_luma(gray: Tensor) -> Tensor:
    """Round the mean of each image of :func:`luma`: [n, 1, 1, 1]."""
    # Both sums are exact, in float32 along a row and then in float64: their order does not matter.
    mean = gray.sum(3, keepdim=True).sum(2, keepdim=True, dtype=torch.float64)
    return mean.div_(gray.shape[2] * gray.shape[3]).add_(0.5).floor_().to(gray.dtype)


def grayscale(x: Tensor, values: Tensor) -> Tensor:
    """Convert to gray, in place."""
    return x.copy_(luma(x).expand_as(x))


def brightness(x: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness as PIL does, in place."""
    return x.mul_(column(factors)).clamp_(max=255).floor_()


def contrast(x: Tensor, factors: Tensor) -> Tensor:
    """Scale contrast as PIL does."""
    return blend(x, mean_luma(luma(x)), column(factors))


def saturation(x: Tensor, factors: Tensor) -> Tensor:
    """Scale saturation as PIL does."""
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


_ONE = 1 << 24  # a weight of 1, in the parts that PIL counts weights in
_MIDDLE = 128


def box_reach(sigma: float) -> int:
    """Largest distance of a pixel with a weight in :func:`box_weights`."""
    return int((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1


def box_weights(sigmas: Params, reach: int | None = None) -> Params:
    """Compute the box filter that PIL's Gaussian applies three times: float32 [n, reach + 1].

    Column d is the weight of the pixels at distance d, in units of 1 / 2**24; a sigma of 0 leaves
    every pixel as it is. Without `reach`, it is that of the largest sigma. The outermost weight is
    a fraction of the inner ones, chosen so that the variance is exact (Gwosdek et al., "Theoretical
    foundations of Gaussian convolution by extended box filtering", SSVM 2011, equations 7, 11 and
    14). Rounded where PIL rounds, they add up to 1 or a few units less.
    """
    variance = np.square(np.asarray(sigmas, dtype=np.float32)[:, None]) / 3
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    inner = np.floor((length - 1) / 2)
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    edge /= 6 * (variance - np.square(inner + 1))
    radius = inner + edge
    whole = np.floor(radius).astype(np.int64)
    within = np.floor(np.float32(_ONE) / (2 * radius + 1)).astype(np.int64)
    outermost = (_ONE - (2 * whole + 1) * within) // 2
    distance = np.arange(int(whole.max(initial=0)) + 2 if reach is None else reach + 1)
    weights = within * (distance <= whole) + outermost * (distance == whole + 1)
    return weights.astype(np.float32)


def blur(x: Tensor, weights: Tensor) -> Tensor:
    """Gaussian blur as in PIL, to the bit: rounded after each box, the border pixels repeated."""
    parts = weights.to(torch.int32)[:, :, None, None, None]
    # Around 128, so that all sums stay within 32 bits with a sign; what that takes from a sum, and
    # the half that rounds, are put back in one number a sample.
    whole = parts[:, :1] + 2 * parts[:, 1:].sum(1, keepdim=True, dtype=torch.int32)
    offset = ((whole - _ONE) * _MIDDLE + _ONE // 2)[:, 0]
    pixels = x.sub_(_MIDDLE).to(torch.int32)
    total = torch.empty_like(pixels)
    for dim in (3, 3, 3, 2, 2, 2):
        torch.mul(pixels, parts[:, 0], out=total).add_(offset)
        for distance in range(1, weights.shape[1]):
            _add_both_sides(total, pixels, parts[:, distance], distance, dim)
        pixels, total = total.bitwise_right_shift_(24), pixels
    return x.copy_(pixels).add_(_MIDDLE)


def _add_both_sides(total: Tensor, x: Tensor, weight: Tensor, distance: int, dim: int) -> None:
    """Add the two pixels at a distance from each, weighted, with repeated border pixels."""
    length, edge = x.shape[dim], min(distance, x.shape[dim])
    inside = length - edge
    for at, count, others in (
        (edge, inside, x.narrow(dim, 0, inside)),
        (0, inside, x.narrow(dim, edge, inside)),
        (0, edge, x.narrow(dim, 0, 1)),
        (inside, edge, x.narrow(dim, length - 1, 1)),
    ):
        total.narrow(dim, at, count).addcmul_(others, weight)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Solarize as PIL's ImageOps.solarize: values from the threshold on become 255 - x."""
    return torch.where(x < column(threshold), x, 255 - x)


def mirror(x: Tensor, values: Tensor) -> Tensor:
    """Flip horizontally."""
    return x.flip(3)
