"""Flip, colours and blur of whole batches of crops, on the crops' device.

Two forms give the same pixels. The grouped form, :class:`DeviceAugment`, applies each operation
only to samples that drew it. The branch-free form, :class:`StaticAugment`, applies everything to
every sample and keeps what was drawn: shapes and kernels are the same for every batch, so that it
can be compiled, or captured in a CUDA graph. A sample's pixels do not depend on the others in the
batch (on a CPU to the last bit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moco_scale.data.images import pixel_operations as pixels
from moco_scale.data.images.augment import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    Augmentation,
    Params,
)
from moco_scale.utils.to_device import on_device

_KINDS = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)
_ORDER_TABLE = np.array(ORDERS)
_CACHED_ELEMENTS = 2**18


def _checked(crops: Tensor, params: Params | Tensor) -> Params:
    """Return the parameters as an array. Raises ValueError if they do not fit the crops."""
    params = np.asarray(params, dtype=np.float32)
    if params.shape != (len(crops), COLUMNS) or crops.dtype != torch.uint8:
        raise ValueError(
            f"crops {crops.dtype} {list(crops.shape)} do not go with params {params.shape}"
        )
    return params


def _kinds(aug: Augmentation, params: Params) -> npt.NDArray[np.int64]:
    """Find the first, second, third and fourth jitter: int64 [n, 4], -1 for none."""
    orders = params[:, ORDER].astype(np.int64)[:, None]
    kinds = np.where(orders >= 0, _ORDER_TABLE[orders[:, 0]], -1)
    return np.where(np.array(aug.jitter)[kinds] > 0, kinds, -1)


class DeviceAugment:
    """Grouped form: each operation touches only the samples that drew it.

    The host computes which from the parameters, so that nothing waits for the device.
    """

    def __init__(self, aug: Augmentation, mean: Sequence[float], std: Sequence[float]) -> None:
        """Store the settings.

        Args:
            aug: of one view, see :meth:`Augmentation.of`.
            mean: per channel, of pixels in [0, 1], e.g. ImageNet's .485.
            std: likewise, e.g. ImageNet's .229.
        """
        self.aug = aug
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, crops: Tensor, params: Params | Tensor) -> Tensor:
        """Augment crops on their device.

        Args:
            crops: uint8 [B, 3, S, S].
            params: float32 [B, COLUMNS] on the host, as drawn.

        Returns:
            float32 [B, 3, S, S].
        """
        params = _checked(crops, params)
        out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        size = len(crops)
        if crops.device.type == "cpu" and size:
            # One big image at a time stays in the cache; small ones share the cost of a call.
            size = max(1, _CACHED_ELEMENTS // crops[0].numel())
        for i in range(0, len(crops), max(1, size)):
            part = slice(i, i + size)
            out[part].copy_(crops[part])
            self._apply(out[part], params[part])
        return pixels.normalise_(out, self.mean, self.std)

    def _apply(self, x: Tensor, params: Params) -> None:
        """Change `x`, whole numbers from 0 to 255 in float32 [n, 3, S, S], in place."""
        for operation, rows, values in _steps_on(self._steps(params), x.device):
            if len(rows) == len(x):
                result = operation(x, values)
                if result is not x:
                    x.copy_(result)
            else:
                x.index_copy_(0, rows, operation(x.index_select(0, rows), values))

    def _steps(self, params: Params) -> list[_Step]:
        """List the operations in order, with the rows they apply to and their values."""
        gray = _Step.where(pixels.grayscale, params[:, GRAY] > 0, params[:, GRAY])
        steps = [gray] if self.aug.gray_first else []
        for kinds in _kinds(self.aug, params).T:
            for kind, operation in enumerate(_KINDS):
                steps.append(_Step.where(operation, kinds == kind, params[:, BRIGHTNESS + kind]))
        if not self.aug.gray_first:
            steps.append(gray)
        sigmas = params[:, SIGMA]
        steps.append(_Step.where(pixels.blur, sigmas > 0, pixels.box_weights(sigmas)))
        threshold = np.full(len(params), self.aug.solarize_from, dtype=np.float32)
        steps.append(_Step.where(pixels.solarize, params[:, SOLARIZE] > 0, threshold))
        steps.append(_Step.where(pixels.mirror, params[:, FLIP] > 0, params[:, FLIP]))
        return [step for step in steps if len(step.rows)]


class _Step(NamedTuple):
    operation: pixels.Operation
    rows: npt.NDArray[np.int32]
    values: Params

    @staticmethod
    def where(operation: pixels.Operation, mask: npt.NDArray[np.bool_], values: Params) -> _Step:
        rows = np.flatnonzero(mask)
        values = values[rows].reshape(len(rows), math.prod(values.shape[1:]))
        return _Step(operation, rows.astype(np.int32), values)


def _steps_on(
    steps: list[_Step], device: torch.device
) -> list[tuple[pixels.Operation, Tensor, Tensor]]:
    """Move the steps' rows and values to the device, in one transfer."""
    if not steps:
        return []
    rows = np.concatenate([step.rows for step in steps])
    values = np.concatenate([step.values.ravel() for step in steps])
    table = on_device(np.concatenate([rows.view(np.float32), values]), device)
    row_parts = table[: len(rows)].view(torch.int32).long().split([len(s.rows) for s in steps])
    value_parts = table[len(rows) :].split([s.values.size for s in steps])
    return [
        (step.operation, row_part, value_part.view(len(row_part), -1))
        for step, row_part, value_part in zip(steps, row_parts, value_parts, strict=True)
    ]


class StaticAugment:
    """Branch-free form: applies every operation to every sample and keeps what was drawn.

    Uncompiled, it gives the grouped form's pixels to the bit. Compiled, products and sums may be
    fused and rounded once: now and then a value differs by one of 255 steps.
    """

    # Columns of :meth:`table`; the weights of the blur follow.
    _FLIP, _FACTORS, _ORDER, _GRAY, _SOLARIZE, _WEIGHTS = 0, 1, 5, 9, 10, 11

    def __init__(
        self,
        aug: Augmentation,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        compiled: bool = False,
    ) -> None:
        """Store the settings.

        Args:
            aug: as in :class:`DeviceAugment`.
            mean: likewise.
            std: likewise.
            compiled: compile by torch.compile, once for each shape of crops.
        """
        self.aug = aug
        self.mean, self.std = tuple(mean), tuple(std)
        self._reach = pixels.box_reach(aug.blur_sigma[1]) if aug.blur_p else 0
        self._run = (
            torch.compile(self.apply, dynamic=False, fullgraph=True) if compiled else self.apply
        )

    def __call__(self, crops: Tensor, params: Params | Tensor) -> Tensor:
        """Augment crops on their device.

        Args:
            crops: uint8 [B, 3, S, S].
            params: float32 [B, COLUMNS] on the host, as drawn.

        Returns:
            float32 [B, 3, S, S].
        """
        table = on_device(self.table(_checked(crops, params)), crops.device)
        return self._run(crops, table) if len(crops) else self.apply(crops, table)

    def table(self, params: Params) -> Params:
        """Convert drawn parameters to the table of :meth:`apply`: float32 [B, columns]."""
        sigmas = params[:, SIGMA] if self._reach else np.zeros(len(params), np.float32)
        columns = (
            params[:, [FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE]],
            _kinds(self.aug, params),
            params[:, [GRAY, SOLARIZE]],
            pixels.box_weights(sigmas, self._reach),
        )
        return np.concatenate(columns, axis=1, dtype=np.float32)

    def apply(self, crops: Tensor, table: Tensor) -> Tensor:
        """Augment on one device; no shape and no kernel depends on a value.

        Args:
            crops: uint8 [B, 3, S, S].
            table: float32 [B, columns].

        Returns:
            float32 [B, 3, S, S].
        """
        aug, x = self.aug, crops.to(torch.float32)
        if aug.gray_first:
            x = self._gray(x, table)
        if aug.jitter_p and any(aug.jitter):
            for position in range(4):
                x = self._jitter(x, table, position)
        if not aug.gray_first:
            x = self._gray(x, table)
        if self._reach:
            x = pixels.blur(x, table[:, self._WEIGHTS :])
        if aug.solarize_p:
            threshold = torch.full_like(table[:, :1], aug.solarize_from)
            x = self._kept(table, self._SOLARIZE, pixels.solarize(x, threshold), x)
        if aug.flip:
            x = self._kept(table, self._FLIP, x.flip(3), x)
        return pixels.normalise_(x, self.mean, self.std)

    def _kept(self, table: Tensor, column: int, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(pixels.column(table[:, column : column + 1]) > 0, new, old)

    def _gray(self, x: Tensor, table: Tensor) -> Tensor:
        return self._kept(table, self._GRAY, pixels.luma(x), x) if self.aug.gray_p else x

    def _jitter(self, x: Tensor, table: Tensor, position: int) -> Tensor:
        """Apply one of the four jitters; the blends differ only in the other image."""
        kinds = pixels.column(table[:, self._ORDER + position :])
        factors = table[:, self._FACTORS : self._ORDER]
        gray, factor, base = pixels.luma(x), torch.ones_like(kinds), torch.zeros_like(kinds)
        for kind, other in enumerate((base, pixels.mean_luma(gray), gray)):
            factor = torch.where(kinds == kind, pixels.column(factors[:, kind:]), factor)
            base = torch.where(kinds == kind, other, base)
        result = pixels.blend(x.clone(), base, factor)  # of 1 with nothing, where none is due
        if self.aug.jitter[3]:
            hue = kinds == HUE - BRIGHTNESS
            result = torch.where(hue, pixels.hue(x.clone(), factors[:, 3:]), result)
        return result
