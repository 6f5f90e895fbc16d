"""Augmentations: what they are, the random parameters of a view, and their application in batches.

The worker only crops (`moco_scale.data.views`). Flip, colour and blur are applied here, on the
training device, to whole batches. The published recipes run on 8-bit PIL images, so every
operation here reproduces PIL's, rounding included, on float tensors that hold whole numbers from
0 to 255. This also makes a view's pixels independent of the batch it is computed in.

A view has VIEW_SLOTS uniform numbers, a function of (seed, epoch, sample, view). Each random
decision has a slot of its own, so that changing one augmentation leaves the other draws alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moco_scale.data.random import uniforms
from moco_scale.data.views import CROP_SLOTS

Params = npt.NDArray[np.float32]

# Slots of a view's uniform numbers; those below CROP_SLOTS place the crop.
_FLIP, _JITTER, _FACTORS = CROP_SLOTS, CROP_SLOTS + 1, CROP_SLOTS + 2  # four factors
_ORDER, _GRAY, _BLUR, _SIGMA = (CROP_SLOTS + i for i in (6, 7, 8, 9))
VIEW_SLOTS = CROP_SLOTS + 10

# Columns of the parameters that `draw_params` returns.
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA = range(8)
NO_JITTER = -1.0
ORDERS = tuple(permutations(range(4)))


@dataclass(frozen=True)
class Augmentation:
    """One recipe of random views; probabilities end in _p.

    crop_min, crop_max: share of the picture's area a crop covers (RandomResizedCrop).
    jitter: strengths of brightness, contrast, saturation (factor uniform in
    [max(0, 1 - x), 1 + x]) and hue (shift uniform in [-x, x] turns), as in torchvision's
    ColorJitter; applied in random order. gray_first: grayscale before the jitter, not after it.
    blur_sigma: range of the Gaussian's standard deviation, in pixels.
    """

    crop_min: float
    crop_max: float = 1.0
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    gray_p: float = 0.0
    gray_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.crop_min <= self.crop_max <= 1:
            raise ValueError(f"crop from {self.crop_min} to {self.crop_max} of the area")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter strengths {self.jitter}: not negative, hue at most 0.5")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur sigma from {self.blur_sigma[0]} to {self.blur_sigma[1]}")


_STRONG = (0.4, 0.4, 0.4, 0.4)
_WEAK_HUE = (0.4, 0.4, 0.4, 0.1)

AUGMENTATIONS: dict[str, Augmentation] = {
    # MoCo (He et al., CVPR 2020), as in its official code: grayscale comes before the jitter.
    "v1": Augmentation(crop_min=0.2, jitter=_STRONG, jitter_p=1.0, gray_p=0.2, gray_first=True),
    # MoCo v2 (Chen et al., 2020).
    "v2": Augmentation(crop_min=0.2, jitter=_WEAK_HUE, jitter_p=0.8, gray_p=0.2, blur_p=0.5),
    # "CJ" and "NULL" of the CMC code base, with which MoCo v1 was reproduced in 40 hours.
    "cj": Augmentation(crop_min=0.08, jitter=_STRONG, jitter_p=1.0, gray_p=0.2, gray_first=True),
    "null": Augmentation(crop_min=0.08),
    # The official CIFAR-10 demo.
    "cifar": Augmentation(crop_min=0.08, jitter=_WEAK_HUE, jitter_p=0.8, gray_p=0.2),
    # Training of a linear classifier on frozen features.
    "linear": Augmentation(crop_min=0.08),
}


def draw_params(
    aug: Augmentation,
    seed: int,
    epoch: int | npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    view: int,
) -> Params:
    """What the device does to one view of each sample: float32 [len(samples), 8].

    Columns: FLIP 0 or 1; factors BRIGHTNESS, CONTRAST, SATURATION; HUE shift in turns; ORDER, an
    index into ORDERS or NO_JITTER; GRAY 0 or 1; SIGMA of the blur in pixels, 0 for none. `epoch`
    is one number or one for each sample. A function of the arguments alone, not of the picture:
    any rank can compute any sample's.
    """
    u = uniforms(seed, epoch, samples, view, VIEW_SLOTS)
    params = np.empty((len(u), 8), dtype=np.float32)
    params[:, FLIP] = u[:, _FLIP] < aug.flip
    for i, strength in enumerate(aug.jitter[:3]):
        low = max(0.0, 1 - strength)
        params[:, BRIGHTNESS + i] = low + (1 + strength - low) * u[:, _FACTORS + i]
    params[:, HUE] = aug.jitter[3] * (2 * u[:, _FACTORS + 3] - 1)
    order = np.floor(u[:, _ORDER] * len(ORDERS))
    params[:, ORDER] = np.where(u[:, _JITTER] < aug.jitter_p, order, NO_JITTER)
    params[:, GRAY] = u[:, _GRAY] < aug.gray_p
    low, high = aug.blur_sigma
    sigma = low + (high - low) * u[:, _SIGMA]
    params[:, SIGMA] = np.where(u[:, _BLUR] < aug.blur_p, sigma, 0.0)
    return params


class DeviceAugment:
    """Applies drawn parameters to crops, on the crops' device, and normalises.

    Each operation touches only the samples that drew it; which ones is worked out on the host from
    `params`, so that nothing waits for the device. A sample's pixels do not depend on the others in
    the batch (on a CPU to the last bit).
    """

    def __init__(self, aug: Augmentation, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std`, per channel, are of pixels in [0, 1], e.g. ImageNet's .485 and .229."""
        self.aug = aug
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, crops: Tensor, params: Params | Tensor) -> Tensor:
        """`crops` uint8 [B, 3, S, S], `params` float32 [B, 8] on the host, as from `draw_params`.

        Returns float32 [B, 3, S, S] on the device of `crops`.
        """
        params = np.asarray(params, dtype=np.float32)
        if params.shape != (len(crops), 8) or crops.dtype != torch.uint8:
            raise ValueError(
                f"crops {crops.dtype} {list(crops.shape)} do not go with params {params.shape}"
            )
        out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        size = len(crops)
        if crops.device.type == "cpu" and size:
            # One big picture at a time stays in the cache; small ones share the cost of a call.
            size = max(1, _CACHED_ELEMENTS // crops[0].numel())
        for i in range(0, len(crops), max(1, size)):
            part = slice(i, i + size)
            out[part].copy_(crops[part])
            self._apply(out[part], params[part])
        return _normalise_(out, self.mean, self.std)

    def _apply(self, x: Tensor, params: Params) -> None:
        """Change `x`, whole numbers from 0 to 255 in float32 [n, 3, S, S], in place."""
        for operation, rows, values in _uploaded(self._steps(params), x.device):
            if len(rows) == len(x):
                result = operation(x, values)
                if result is not x:
                    x.copy_(result)
            else:
                x.index_copy_(0, rows, operation(x.index_select(0, rows), values))

    def _steps(self, params: Params) -> list[_Step]:
        """What to do, in order: operations, the rows they apply to, their per-row values."""
        gray = _Step.where(_grayscale, params[:, GRAY] > 0, params[:, GRAY])
        steps = [gray] if self.aug.gray_first else []
        orders = params[:, ORDER].astype(np.int64)
        for position in range(4):
            kinds = np.where(orders >= 0, _ORDER_TABLE[orders, position], -1)
            for kind, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
                if self.aug.jitter[kind] > 0:
                    steps.append(
                        _Step.where(operation, kinds == kind, params[:, BRIGHTNESS + kind])
                    )
        if not self.aug.gray_first:
            steps.append(gray)
        steps.append(_Step.where(_blur, params[:, SIGMA] > 0, _box_weights(params[:, SIGMA])))
        steps.append(_Step.where(_mirror, params[:, FLIP] > 0, params[:, FLIP]))
        return [step for step in steps if len(step.rows)]


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(crops / 255 - mean) / std, nothing else: uint8 [B, 3, S, S] to float32, same device."""
    return _normalise_(crops.to(torch.float32), mean, std)


def _normalise_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].mul_(1 / (255 * s)).add_(-m / s)
    return x


# Operations: (x, values) -> x. `x` holds whole numbers from 0 to 255 in float32 [n, 3, H, W] and
# may be changed in place; `values` has one row per sample. Products and sums are separate calls on
# purpose: fused ones round differently in the vectorised part of a loop and in its rest.
_Operation = Callable[[Tensor, Tensor], Tensor]

_CACHED_ELEMENTS = 2**20
_ORDER_TABLE = np.array(ORDERS)
_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2 in 1/65536; the sums are exact in float32


class _Step(NamedTuple):
    operation: _Operation
    rows: npt.NDArray[np.int64]
    values: Params

    @staticmethod
    def where(operation: _Operation, mask: npt.NDArray[np.bool_], values: Params) -> _Step:
        rows = np.flatnonzero(mask)
        return _Step(operation, rows, values[rows].reshape(len(rows), math.prod(values.shape[1:])))


def _uploaded(steps: list[_Step], device: torch.device) -> list[tuple[_Operation, Tensor, Tensor]]:
    """The steps with rows and values on the device, in one transfer each that nobody waits for."""
    if not steps:
        return []
    rows = torch.from_numpy(np.concatenate([step.rows for step in steps]))
    values = torch.from_numpy(np.concatenate([step.values.ravel() for step in steps]))
    if device.type == "cuda":
        rows, values = rows.pin_memory(), values.pin_memory()
    rows, values = rows.to(device, non_blocking=True), values.to(device, non_blocking=True)
    row_parts = rows.split([len(step.rows) for step in steps])
    value_parts = values.split([step.values.size for step in steps])
    return [
        (step.operation, row_part, value_part.view(len(row_part), -1))
        for step, row_part, value_part in zip(steps, row_parts, value_parts, strict=True)
    ]


def _column(values: Tensor) -> Tensor:
    return values[:, 0, None, None, None]


def _blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """PIL's Image.blend(base, x, factor): clipped, then cut off, not rounded."""
    return x.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _luma(x: Tensor) -> Tensor:
    """PIL's convert("L"): [n, 1, H, W]."""
    luma = x[:, 0:1] * _LUMA[0]
    luma.add_(x[:, 1:2] * _LUMA[1]).add_(x[:, 2:3] * _LUMA[2])
    return luma.add_(32768).mul_(1 / 65536).floor_()


def _grayscale(x: Tensor, values: Tensor) -> Tensor:
    return x.copy_(_luma(x).expand_as(x))


def _brightness(x: Tensor, factors: Tensor) -> Tensor:
    return x.mul_(_column(factors)).clamp_(max=255).floor_()


def _contrast(x: Tensor, factors: Tensor) -> Tensor:
    # Both sums are exact, in float32 along a row and then in float64: their order does not matter.
    mean = _luma(x).sum(3, keepdim=True).sum(2, keepdim=True, dtype=torch.float64)
    mean = mean.div_(x.shape[2] * x.shape[3]).add_(0.5).floor_().to(x.dtype)
    return _blend(x, mean, _column(factors))


def _saturation(x: Tensor, factors: Tensor) -> Tensor:
    return _blend(x, _luma(x), _column(factors))


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue as torchvision does on PIL images: through 8-bit HSV, whose hue has period 256.

    (In 8-bit HSV 255 is a whole turn, so the wrap is off by one step; the published recipes are.)
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    span = value - torch.minimum(torch.minimum(r, g), b)
    saturated = (span * 255).div_(value.clamp(min=1)).floor_().mul_(1 / 255).mul_(value)
    # Hue in sixths of a turn, times the span: 0 at red, 2 at green, 4 at blue.
    hue = torch.where(g == value, (b - r).add_(span).add_(span), (r - g).add_(span * 4))
    hue = torch.where(r == value, g - b, hue)
    span.mul_(6).clamp_(min=1)
    hue.add_(span * (hue < 0)).mul_(255).div_(span).floor_()
    hue.add_(turns.mul(255).trunc_()[:, :, None])
    hue.sub_((hue * (1 / 256)).floor_().mul_(256)).mul_(6 / 255)
    value.add_(0.5)
    for channel, centre in enumerate((3, 2, 4)):
        # How much of `saturated` the channel lacks: nothing near its own hue, all of it far away.
        lack = x[:, channel].copy_(hue).sub_(centre).abs_()
        lack = lack.neg_().add_(2) if channel == 0 else lack.sub_(1)
        lack.clamp_(0, 1).mul_(saturated).neg_().add_(value).floor_()
    return x


def _box_weights(sigmas: Params) -> Params:
    """PIL's Gaussian is three box filters in a row, here the box of each: float32 [n, reach + 1].

    Column d is the weight of the pixels at distance d. The outermost weight is a fraction of the
    inner ones, chosen so that the variance is exact (Gwosdek et al., "Theoretical foundations of
    Gaussian convolution by extended box filtering", SSVM 2011, equations 7, 11 and 14).
    """
    variance = np.asarray(sigmas, dtype=np.float64)[:, None] ** 2 / 3
    inner = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    edge /= 6 * (variance - (inner + 1) ** 2)
    distance = np.arange(int(inner.max(initial=0)) + 2)
    weights = (distance <= inner) + edge * (distance == inner + 1)
    return (weights / (2 * (inner + edge) + 1)).astype(np.float32)


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    """Gaussian blur as in PIL: rounded after each box, the border pixels repeated."""
    for dim in (3, 3, 3, 2, 2, 2):
        x = _box_blur(x, weights[:, :, None, None, None], dim)
    return x


def _box_blur(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    total, length = x * weights[:, 0], x.shape[dim]
    for distance in range(1, weights.shape[1]):
        share, edge = x * weights[:, distance], min(distance, length)
        inside = length - edge
        total.narrow(dim, edge, inside).add_(share.narrow(dim, 0, inside))
        total.narrow(dim, 0, inside).add_(share.narrow(dim, edge, inside))
        total.narrow(dim, 0, edge).add_(share.narrow(dim, 0, 1))
        total.narrow(dim, inside, edge).add_(share.narrow(dim, length - 1, 1))
    return total.add_(0.5).floor_()


def _mirror(x: Tensor, values: Tensor) -> Tensor:
    return x.flip(3)
