"""Model FLOPs utilisation (MFU): a run's arithmetic as a share of the devices' peak."""

from __future__ import annotations

import dataclasses

import torch

from moco_scale.config.schema import Config
from moco_scale.planner.cluster import PRESETS
from moco_scale.planner.trace import trace_step

# Substrings of torch's device names, the first match counts; None: a card of unknown peak.
_KNOWN = {
    "GB200": None,
    "B200": "b200",
    "H200 NVL": "h100-nvl",
    "H100 NVL": "h100-nvl",
    "H100 PCIe": "h100-pcie",
    "H200": "h200",
    "H100": "h100",
    "L40S": "l40s",
    "A1000": None,  # a small card for desks
    "A100": "a100",
    "V100-PCIE": None,
    "V100S": None,
    "V100": "v100",
}


def device_name(device: torch.device) -> str:
    """Name of the GPU; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _known_peak(name: str, precision: str) -> float | None:
    """Peak TFLOPS of a device by torch's name."""
    known = next((preset for key, preset in _KNOWN.items() if key in name), None)
    if known is None:
        return None
    return PRESETS[known].tflops_fp32 if precision == "fp32" else PRESETS[known].tflops_half


class Utilisation:
    """MFU of one run on one kind of device.

    FLOPs are those of the query's forward and backward pass and the key's forward pass, without
    the recomputation of ``--activation-checkpointing``. The peak is ``--peak-tflops``, else the
    one known for the device.

    Args:
        config: of the run.
        world: ranks.
        name: torch's, of each rank's device.
    """

    def __init__(self, config: Config, world: int, name: str) -> None:
        tflops = config.run.peak_tflops or _known_peak(name, config.run.precision)
        self._share_of_an_image = None
        if tflops is None:
            return
        peak = tflops * 1e12 * world
        run = dataclasses.replace(config.run, activation_checkpointing=False)
        trace = trace_step(dataclasses.replace(config, run=run), world)
        self._share_of_an_image = trace.flops * world / config.optim.batch_size / peak

    def of(self, images_per_second: float) -> float | None:
        """Return the MFU at this speed of all ranks together; None for an unknown peak."""
        if self._share_of_an_image is None:
            return None
        return self._share_of_an_image * images_per_second
