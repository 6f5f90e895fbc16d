"""Fuzz target: a user's DeepSpeed JSON, read for a run of every precision."""

from __future__ import annotations

import json
from pathlib import Path

from moco_scale.config.deepspeed_file import look_through, requested_number, requested_precision
from moco_scale.utils.errors import UserError

_SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"
_ODD = (
    {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "sub_group_size": 1,
        }
    },
    {"tensorboard": {"enabled": True}, "comms_logger": {"enabled": True, "verbose": True}},
    {"timers": {"throughput": {"enabled": True}}, "steps_per_print": 1, "aio": {"block_size": 1}},
    {"data_types": {"grad_accum_dtype": "bf16"}, "gradient_clipping": 1e300, "log_level": "info"},
)


def SEEDS() -> list[bytes]:
    """Return the files that are shipped, and some with what they do not have."""
    shipped = [path.read_bytes() for path in sorted(_SHIPPED.glob("*.json"))]
    return shipped + [json.dumps(content).encode() for content in _ODD]


def run(data: bytes, folder: Path) -> None:
    """Read one file; a UserError is an answer, anything else is not."""
    path = folder / "ds.json"
    path.write_bytes(data)
    for precision in ("fp32", "bf16", "fp16"):
        try:
            requested_precision(str(path))
            requested_number(str(path), "gradient_clipping")
            look_through(
                str(path),
                batch_size=64,
                world=2,
                precision=precision,
                clip_norm=0.0,
                micro_batches=1,
                parameters=1000,
                overlap=True,
                compiled=True,
            )
        except UserError:
            pass
