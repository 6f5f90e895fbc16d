"""Augmentations: the published chains as data, and the random parameters of a view.

The worker only crops (`data.images.crop`); flip, colour and blur are applied on the training device
(`data.images.device_augment`).

A view has VIEW_SLOTS uniform numbers, a function of (seed, epoch, sample, view). Each random
decision has its own slot, so that changing one augmentation does not change the other draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from moco_scale.data.images.crop import CROP_SLOTS
from moco_scale.data.sampling.random import uniforms

Params = npt.NDArray[np.float32]

# Slots of a view's uniform numbers; those below CROP_SLOTS place the crop.
_FLIP, _JITTER, _FACTORS = CROP_SLOTS, CROP_SLOTS + 1, CROP_SLOTS + 2  # four factors
_ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE = (CROP_SLOTS + i for i in (6, 7, 8, 9, 10))
VIEW_SLOTS = CROP_SLOTS + 11

# Columns of the parameters that `draw_params` returns.
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA, SOLARIZE = range(9)
COLUMNS = 9
NO_JITTER = -1.0
ORDERS = tuple(permutations(range(4)))


@dataclass(frozen=True)
class Augmentation:
    """Recipe of random views; probabilities end in _p.

    Attributes:
        crop_min: smallest share of the image's area that a crop covers (RandomResizedCrop).
        crop_max: largest share.
        jitter: strengths of brightness, contrast, saturation (factor uniform in [max(0, 1 - x),
            1 + x]) and hue (shift uniform in [-x, x] turns), as in torchvision's ColorJitter;
            applied in random order.
        gray_first: grayscale before the jitter, not after it.
        blur_sigma: range of the Gaussian's standard deviation, in pixels.
        solarize_p: after the blur, values from solarize_from on are subtracted from 255.
        per_view: for each view, the fields in which it differs from the others; not the crop's.
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
    solarize_p: float = 0.0
    solarize_from: int = 128
    per_view: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.crop_min <= self.crop_max <= 1:
            raise ValueError(f"crop from {self.crop_min} to {self.crop_max} of the area")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter strengths {self.jitter}: not negative, hue at most 0.5")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur sigma from {self.blur_sigma[0]} to {self.blur_sigma[1]}")
        if any({"crop_min", "crop_max", "per_view"} & own.keys() for own in self.per_view):
            raise ValueError("crops cannot differ between views")
        for view in range(len(self.per_view)):
            self.of(view)

    def of(self, view: int) -> Augmentation:
        """Return the augmentation of one view."""
        if not self.per_view:
            return self
        return dataclasses.replace(self, per_view=(), **self.per_view[view])


_STRONG = (0.4, 0.4, 0.4, 0.4)
_WEAK_HUE = (0.4, 0.4, 0.4, 0.1)

AUGMENTATIONS: dict[str, Augmentation] = {
    # MoCo (He et al., CVPR 2020), as in its official code: grayscale comes before the jitter.
    "v1": Augmentation(crop_min=0.2, jitter=_STRONG, jitter_p=1.0, gray_p=0.2, gray_first=True),
    # MoCo v2 (Chen et al., 2020).
    "v2": Augmentation(crop_min=0.2, jitter=_WEAK_HUE, jitter_p=0.8, gray_p=0.2, blur_p=0.5),
    # MoCo v3 (Chen et al., ICCV 2021), which takes the two views of BYOL (Grill et al., 2020): one
    # is always blurred, the other hardly ever and sometimes solarized. Its ViTs crop from 0.08 on.
    "v3": Augmentation(
        crop_min=0.2,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        per_view=({"blur_p": 1.0}, {"blur_p": 0.1, "solarize_p": 0.2}),
    ),
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
    """Draw the device's parameters of one view of each sample: float32 [len(samples), COLUMNS].

    Columns: FLIP 0 or 1; factors BRIGHTNESS, CONTRAST, SATURATION; HUE shift in turns; ORDER, an
    index into ORDERS or NO_JITTER; GRAY 0 or 1; SIGMA of the blur in pixels, 0 for none; SOLARIZE 0
    or 1. `epoch` is one number or one for each sample. A function of the arguments, not of the
    image: any rank can compute any sample's.
    """
    aug = aug.of(view)
    u = uniforms(seed, epoch, samples, view, VIEW_SLOTS)
    params = np.empty((len(u), COLUMNS), dtype=np.float32)
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
    params[:, SOLARIZE] = u[:, _SOLARIZE] < aug.solarize_p
    return params
