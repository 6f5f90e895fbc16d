"""DeepSpeed JSONs for tests: written, and read as a run would."""

import json
from pathlib import Path
from typing import Any

from moco_scale.config.deepspeed_file import (
    ReadConfiguration,
    look_through,
    refuse,
)
from moco_scale.optim.loss_scale import LossScaling


def write(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def complete(path: str, **changed: Any) -> ReadConfiguration:
    usual: dict[str, Any] = {
        **{
            "batch_size": 256,
            "world": 8,
            "precision": "fp32",
            "clip_norm": 0.0,
            "micro_batches": 1,
        },
        **{"parameters": 1000, "overlap": True, "compiled": False},
    }
    read = look_through(path, **usual | changed)
    refuse(path, read.problems)
    return read


def read(path: str, **changed: Any) -> dict[str, Any]:
    return complete(path, **changed).configuration


def scaling(path: str) -> LossScaling:
    return complete(path, precision="fp16").scaling


def leaves(value: Any) -> list[Any]:
    return [x for v in value.values() for x in leaves(v)] if isinstance(value, dict) else [value]
