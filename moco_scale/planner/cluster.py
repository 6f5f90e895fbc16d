"""Hardware that a plan is for: presets and JSON files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from moco_scale.untrusted.documents import read_json
from moco_scale.untrusted.limits import SETTINGS_JSON
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

GB = 1e9
_SMALLEST, _LARGEST = 1e-6, 1e12  # of any figure of a machine


@dataclass(frozen=True)
class Hardware:
    """Kind of GPU in a kind of cluster; rates are of one direction.

    Attributes:
        name: for the report.
        memory_gib: of a GPU.
        tflops_fp32: peak of fp32 matrix products (without TF32, which is not used).
        tflops_half: peak of bf16 or fp16 ones, dense.
        memory_gbs: bandwidth of a GPU's memory, GB/s.
        node_gbs: GB/s that a GPU sends to others of its node.
        network_gbs: GB/s that a GPU sends to other nodes.
        latency_us: of one message across the network, microseconds.
        compute_share: share of the peak that large matrix products reach.
        memory_share: share of the memory's bandwidth that other operators reach.
        network_share: share of links' rates that collectives reach.
        kernel_us: least time of one operator, microseconds.
        reserved_gib: of a GPU's memory, for CUDA, NCCL and fragmentation.
        images_per_core: images a second that one CPU core decodes and crops twice.
        half: its precisions below fp32.
    """

    name: str
    memory_gib: float
    tflops_fp32: float
    tflops_half: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float
    latency_us: float = 10.0
    compute_share: float = 0.6
    memory_share: float = 0.75
    network_share: float = 0.75
    kernel_us: float = 4.0
    reserved_gib: float = 2.0
    images_per_core: float = 300.0
    half: tuple[str, ...] = ("bf16", "fp16")


# Peaks and rates from NVIDIA's data sheets of each GPU and system, without sparsity (half of what
# they give with it); shares are assumptions that a JSON can replace. Of cards in ordinary servers,
# adapters are an assumption too: one of 200 Gb/s for two GPUs.
PRESETS: dict[str, Hardware] = {
    # HGX and DGX B200: 1.8 TB/s NVLink both ways together, one 400 Gb/s adapter a GPU.
    "b200": Hardware("B200 SXM 180 GB", 180, 75, 2250, 8000, 900, 50, compute_share=0.5),
    # HGX H200: the arithmetic of an H100 SXM, with more and faster memory.
    "h200": Hardware("H200 SXM 141 GB", 140, 67, 989, 4800, 450, 50, compute_share=0.5),
    # DGX H100: 900 GB/s NVLink both ways together, one 400 Gb/s adapter a GPU.
    "h100": Hardware("H100 SXM 80 GB", 80, 67, 989, 3350, 450, 50, compute_share=0.5),
    # Cards that a bridge joins in pairs; the others of a node are reached over PCIe 5, 64 GB/s.
    "h100-nvl": Hardware("H100 NVL 94 GB", 94, 60, 835, 3900, 64, 12.5, compute_share=0.5),
    "h100-pcie": Hardware("H100 PCIe 80 GB", 80, 51, 756, 2000, 64, 12.5, compute_share=0.5),
    # PCIe 4, 32 GB/s; 48 GB, of which error correction takes some.
    "l40s": Hardware("L40S 48 GB", 45, 91.6, 362, 864, 32, 12.5),
    # DGX A100: 600 GB/s NVLink both ways together, one 200 Gb/s adapter a GPU.
    "a100": Hardware("A100 SXM 80 GB", 80, 19.5, 312, 2039, 300, 25),
    # DGX-1: 300 GB/s NVLink both ways together, four 100 Gb/s adapters for eight GPUs.
    "v100": Hardware("V100 SXM2 32 GB", 32, 15.7, 125, 900, 150, 6.25, half=("fp16",)),
}


def read_hardware(name: str) -> Hardware:
    """Read a preset by name, or a JSON file with the fields of :class:`Hardware`.

    A file with ``"like": PRESET`` needs only the fields that differ.

    Raises:
        UserError: The name is neither, or a field is unknown, missing or no positive number.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    if not name.endswith(".json"):
        raise UserError(
            f"--hardware {name}: known are {', '.join(PRESETS)}; or name a .json file with the "
            f"fields {', '.join(f.name for f in fields(Hardware))}"
        )
    given = read_json(name, SETTINGS_JSON, "hardware description")
    if not isinstance(given, dict):
        raise UserError(f"hardware description {name}: must be a JSON object")
    return _from_json(name, given)


def _from_json(path: str, given: dict[str, Any]) -> Hardware:
    values = dict(given)
    like = values.pop("like", None)
    if like is not None and (not isinstance(like, str) or like not in PRESETS):
        raise UserError(
            f'hardware description {path}: "like" {printable(repr(like), 80)} is none of '
            f"{list(PRESETS)}"
        )
    known = {f.name: f for f in fields(Hardware)}
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"hardware description {path}: {printable(repr(key), 80)} is unknown; there are "
                f"{', '.join(known)}"
            )
        if key == "name":
            good = isinstance(value, str)
            values["name"] = printable(value, 60)
        elif key == "half":
            good = isinstance(value, list) and all(v in ("bf16", "fp16") for v in value)
            values["half"] = tuple(value) if good else value
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good = number and _SMALLEST <= value <= _LARGEST
        if not good:
            raise UserError(
                f"hardware description {path}: {key} {printable(repr(value), 80)} is not what it "
                "must be"
            )
    if like is not None:
        return dataclasses.replace(PRESETS[like], **{"name": path, **values})
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(
            f"hardware description {path}: {', '.join(missing)} missing; add them, or "
            f'"like": one of {", ".join(PRESETS)}'
        )
    return Hardware(**values)
