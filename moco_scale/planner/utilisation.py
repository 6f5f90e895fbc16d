"""Model FLOPs utilisation: how much of a device's peak a run's arithmetic is."""

from __future__ import annotations

import dataclasses

import torch

from moco_scale.config import Config
from moco_scale.planner.cluster import PRESETS
from moco_scale.planner.trace import trace_step

# What torch calls a device contains one of these; an H200 computes as an H100 does.
_KNOWN = {"H100": "h100", "H200": "h100", "A100": "a100", "V100": "v100"}


def device_name(device: torch.device) -> str:
    """The kind of GPU; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


class Utilisation:
    """Of one run on one kind of device.

    FLOPs are those of the query's forward and backward pass and the key's forward pass; what
    ``--activation-checkpointing`` computes again does not count.

    Args:
        config: of the run.
        world: ranks.
        name: of each one's device, as torch gives it.
    """

    def __init__(self, config: Config, world: int, name: str) -> None:
        preset = next((PRESETS[p] for part, p in _KNOWN.items() if part in name), None)
        self._share_of_an_image = None
        if preset is None:
            return
        half = config.run.precision != "fp32"
        peak = (preset.tflops_half if half else preset.tflops_fp32) * 1e12 * world
        run = dataclasses.replace(config.run, activation_checkpointing=False)
        trace = trace_step(dataclasses.replace(config, run=run), world)
        self._share_of_an_image = trace.flops * world / config.optim.batch_size / peak

    def of(self, images_per_second: float) -> float | None:
        """Share of the peak at this speed of all ranks together; None where none is known."""
        if self._share_of_an_image is None:
            return None
        return self._share_of_an_image * images_per_second
