"""Training, with its monitor, and eval.py compute alike on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_scale.__main__ import main
from moco_scale.commands import evaluate
from moco_scale.config.command_line import parse
from moco_scale.engines.base import EngineSettings
from moco_scale.engines.ddp import DDPEngine
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import build_encoder
from moco_scale.training import run
from moco_scale.utils import determinism


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
    monkeypatch.setattr(evaluate, "evaluate", _stop)
    argv = ["--data-dir", "x", "--pretrained-model", "y", "--output-dir", str(tmp_path)]
    with pytest.raises(Reached):
        main(["evaluate", *argv, "--device", "cpu"])
    assert not any(_switches().values())


def test_pretraining_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_data", _stop)
    with pytest.raises(Reached):
        run.Run(parse(["--device", "cpu"]))
    assert not any(_switches().values())


GPU, SETTINGS = torch.device("cuda", 0), EngineSettings(momentum=0.9, weight_decay=0.0)


def strictness(model: str, device: torch.device) -> list[bool]:
    """Whether torch adds up in one order alone: forward, backward, for keys, and afterwards."""
    encoder = build_encoder(model, stem="cifar", dim=8, image_size=16)
    engine, seen = DDPEngine(MoCo(encoder), SETTINGS, device), []

    def look(*_: Any) -> None:
        strict = torch.are_deterministic_algorithms_enabled()
        seen.append(strict and not torch.is_deterministic_algorithms_warn_only_enabled())

    engine.moco.query.register_forward_hook(look)
    engine.moco.key.register_forward_hook(look)
    next(iter(engine.moco.trained_parameters().values())).register_hook(look)
    image = torch.randn(2, 3, 16, 16)
    (query,) = engine.query(image)
    engine.key(image)
    engine.backward(query[:, 0].mean())
    look()
    return seen


def test_attention_on_a_gpu_adds_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    determinism.set_switches()  # torch would refuse to multiply matrices on a GPU otherwise
    assert strictness("vit_small", GPU) == [True, True, True, False]
    assert strictness("vit_small", torch.device("cpu")) == [False] * 4
    assert strictness("resnet18", GPU) == [False] * 4  # nothing slower than it has to be


def test_a_workspace_of_the_users_own_is_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    determinism.set_switches()
    assert strictness("vit_small", GPU) == [False] * 4
    engine = DDPEngine(MoCo(build_encoder("vit_small", dim=8, image_size=16)), SETTINGS, GPU)
    assert "CUBLAS_WORKSPACE_CONFIG" in engine.notes[0]
