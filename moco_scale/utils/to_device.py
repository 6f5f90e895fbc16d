"""Transfer of small arrays to the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor of the same values, transferred without waiting.

    From pageable memory CUDA may wait for all work of the stream first. On a CPU the tensor shares
    the array's memory.
    """
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
