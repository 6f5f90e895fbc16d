"""Output folders for tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moco_scale.checkpoints.run_folder import RunFolder
from moco_scale.config.resolve import build
from moco_scale.utils.errors import UserError


def folder(path: Path, fingerprint: str = "f", **values: Any) -> RunFolder:
    return RunFolder(build("cifar10", {"output_dir": str(path), **values}), fingerprint)


def save(run: RunFolder, *steps: int, keep: tuple[int, ...] = ()) -> None:
    for step in steps:
        tensors = {"x": torch.tensor(float(step))}
        run.save(step, tensors, {"x": "model.y.z"}, {"step": step, "epoch": 0}, step in keep)
    run.finish_saving()


def steps(run: RunFolder) -> list[int]:
    return [int(c.name.removeprefix("step-")) for c in run.checkpoints()]


def refusal(run: RunFolder) -> str:
    with pytest.raises(UserError) as error:
        run.prepare()
    return str(error.value)
