"""Crops of decoded images, as uint8, in the worker. The device does everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.data.images.decode import Pixels

# Slots of a view's uniform numbers, see `moco_scale.data.images.augment` for the ones after these.
CROP_TRIES = 10
TOP, LEFT = 2 * CROP_TRIES, 2 * CROP_TRIES + 1
CROP_SLOTS = 2 * CROP_TRIES + 2

RATIO_MIN, RATIO_MAX = 3 / 4, 4 / 3
_LOG_RATIO_MIN, _LOG_RATIO_MAX = math.log(RATIO_MIN), math.log(RATIO_MAX)

_LONGEST = 32  # times as long as wide, of which the evaluation view shows one

Box = tuple[int, int, int, int]

_resize_into = torch.ops.aten._upsample_bilinear2d_aa.out


def crop_box(
    uniforms: Sequence[float], height: int, width: int, crop_min: float, crop_max: float
) -> Box:
    """Compute the (top, left, height, width) of RandomResizedCrop, ratio 3/4 to 4/3.

    A share of the area, uniform in [crop_min, crop_max], and an aspect ratio, log-uniform, are
    tried until the box fits, ten times at most; then the largest box in the middle with an allowed
    ratio is taken. `uniforms` holds CROP_SLOTS numbers in [0, 1): area and ratio of each try, then
    the position.
    """
    area = height * width
    for i in range(CROP_TRIES):
        target = area * (crop_min + (crop_max - crop_min) * uniforms[2 * i])
        log_ratio = _LOG_RATIO_MIN + (_LOG_RATIO_MAX - _LOG_RATIO_MIN) * uniforms[2 * i + 1]
        ratio = math.exp(log_ratio)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(uniforms[TOP] * (height - h + 1)), int(uniforms[LEFT] * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width / height < RATIO_MIN:
        h = round(width / RATIO_MIN)
    elif width / height > RATIO_MAX:
        w = round(height * RATIO_MAX)
    return (height - h) // 2, (width - w) // 2, h, w


def write_crop(out: Tensor, pixels: Pixels, box: Box) -> None:
    """Resize the box of `pixels`, uint8 [H, W, 3], into `out`, uint8 [3, S, S].

    Bilinear with antialiasing, as PIL does it. Without antialiasing it is faster and wrong.
    """
    top, left, height, width = box
    # Whole in memory, of which the kernel makes use, as of an `out` that has colours innermost.
    whole = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    region = torch.from_numpy(whole).permute(2, 0, 1)
    if region.shape == out.shape:
        out.copy_(region)
    else:
        # What F.interpolate calls, which would make a tensor of its own to be copied.
        _resize_into(region[None], out.shape[1:], False, None, None, out=out[None])


def write_centre(out: Tensor, pixels: Pixels, resize_ratio: float) -> None:
    """Write the evaluation view to `out`, uint8 [3, S, S].

    The short side becomes round(S * resize_ratio), then the middle S x S is cut out: torchvision's
    Resize and CenterCrop. resize_ratio is 8/7 for ImageNet, 1 for CIFAR, and at least 1.
    """
    size = out.shape[1]
    short = round(size * resize_ratio)
    pixels = _middle(pixels)
    height, width = pixels.shape[:2]
    if height <= width:
        height, width = short, int(short * width / height)
    else:
        height, width = int(short * height / width), short
    resized = _resized(torch.from_numpy(pixels).permute(2, 0, 1), height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    out.copy_(resized[:, top : top + size, left : left + size])


def _middle(pixels: Pixels) -> Pixels:
    """Return the region of a very elongated image that the centre view can show.

    Resizing all of it would take memory in proportion to the square of its elongation.
    """
    height, width = pixels.shape[:2]
    most = _LONGEST * min(height, width)
    if max(height, width) <= most:
        return pixels
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return np.ascontiguousarray(pixels[top : top + most, left : left + most])


def _resized(region: Tensor, height: int, width: int) -> Tensor:
    if region.shape[1:] == (height, width):
        return region
    return F.interpolate(region[None], (height, width), mode="bilinear", antialias=True)[0]
