"""Training, with its monitor, and eval.py compute alike on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_scale import pretrain
from moco_scale.command_line import parse
from moco_scale.evaluation import command


class Reached(Exception):
    """The place before which the switches must be set."""


def _switches() -> dict[str, bool]:
    cudnn = torch.backends.cudnn
    return {
        "cuDNN's TF32": cudnn.allow_tf32,
        "cuBLAS's TF32": torch.backends.cuda.matmul.allow_tf32,
        "any kernel": not cudnn.deterministic,
        "the fastest kernel": cudnn.benchmark,
    }


@pytest.fixture(autouse=True)
def loose() -> Iterator[None]:
    """Every switch the wrong way, and as it was afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    names: tuple[tuple[Any, str], ...] = (
        (cudnn, "allow_tf32"),
        (matmul, "allow_tf32"),
        (cudnn, "benchmark"),
    )
    before = [getattr(module, name) for module, name in names]
    repeats = cudnn.deterministic
    for module, name in names:
        setattr(module, name, True)
    cudnn.deterministic = False
    assert all(_switches().values())
    yield
    for (module, name), value in zip(names, before, strict=True):
        setattr(module, name, value)
    cudnn.deterministic = repeats


def _stop(*_: Any, **__: Any) -> None:
    raise Reached


def test_evaluation_sets_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "evaluate", _stop)
    argv = ["--data-dir", "x", "--pretrained-model", "y", "--output-dir", str(tmp_path)]
    with pytest.raises(Reached):
        command.main([*argv, "--device", "cpu"])
    assert not any(_switches().values())


def test_pretraining_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "open_data", _stop)
    with pytest.raises(Reached):
        pretrain.Pretraining(parse(["--device", "cpu"]))
    assert not any(_switches().values())
