"""``eval.py`` as users start it: alone, under both launchers, on several ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import LIMIT, REPOSITORY, command, forked, make_shards

from moco_scale.models.encoder import build_encoder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file as pretraining writes it, of an encoder that was not trained."""
    opt = {
        **{"model": "resnet18", "model_width": 1, "stem": "imagenet", "head": "linear"},
        **{"dim": 8, "dataset": "images", "image_size": 32, "batch_size": 256},
    }
    content = {
        "opt": opt,
        "model": build_encoder("resnet18", dim=8).state_dict(),
        "model_ema": build_encoder("resnet18", dim=8, seed=1).state_dict(),
        "epoch": 3,
        "step": 30,
    }
    path = tmp_path / "current.pth"
    torch.save(content, path)
    return path


@pytest.fixture
def data(tmp_path: Path, image_folder: Path) -> Path:
    return make_shards(image_folder, tmp_path / "shards")


def arguments(data: Path, model: Path, out: Path, *more: object) -> list[str]:
    flags = ["--data-dir", data, "--pretrained-model", model, "--output-dir", out]
    flags += ["--num-workers", 0, "--batch-size", 12, "--lr", 0.1, "--device", "cpu"]
    return [str(part) for part in [*flags, *more]]


def results(out: Path) -> dict[str, Any]:
    content = json.loads((out / "results.json").read_text())
    assert isinstance(content, dict)
    return content


LINEAR = ("--epochs", 2)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers(launcher: str, data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Of a checkout, and of an installation.
    ways = {"torchrun": ["eval.py"], "deepspeed": ["--module", "moco_scale", "evaluate"]}
    line = [
        word
        for part in command(launcher, *arguments(data, model, out, *LINEAR))
        for word in (ways[launcher] if part == "train.py" else [part])
    ]
    done = subprocess.run(
        line,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("linear-official: top-1") == 1, "said more than once"
    assert done.stdout.count("epoch 2/2: loss") == 1
    result = results(out)
    assert result["settings"]["processes"] == 2
    assert 0 <= result["top1"] <= 100 and result["epoch"] == 3 and result["step"] == 30


def test_an_interrupted_evaluation_continues(data: Path, model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert forked(*arguments(data, model, whole, *LINEAR), script="eval.py").status == 0
    killed = forked(
        *arguments(data, model, parts, *LINEAR), script="eval.py", prepare=_die_after_an_epoch
    )
    assert killed.status != 0 and not (parts / "results.json").exists()
    again = forked(*arguments(data, model, parts, *LINEAR), script="eval.py")
    assert again.status == 0 and "resumed after epoch 1 of 2" in again.output
    assert results(parts)["history"] == results(whole)["history"]


def _die_after_an_epoch() -> None:
    from moco_scale.evaluation import linear_state

    save = linear_state.save

    def save_and_die(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        os._exit(9)

    linear_state.save = save_and_die


def test_what_one_rank_cannot_read_ends_all_with_one_message(
    data: Path, model: Path, tmp_path: Path
) -> None:
    tar = data / "train-000002.tar"  # the end of the split, which belongs to the last rank
    content = bytearray(tar.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start + 2 : start + 300] = bytes(298)
    tar.write_bytes(content)
    for protocol in (["--protocol", "knn"], [*LINEAR]):  # in extraction, in a training step
        out = tmp_path / "out"
        done = forked(*arguments(data, model, out, *protocol), script="eval.py", ranks=2)
        assert done.status == 2, done.output
        assert done.output.count("eval.py: error:") == 1, done.output
        assert "train-000002.tar at byte" in done.output and "--verify" in done.output
        assert "Traceback" not in done.output
        assert not (out / "results.json").exists()


def test_wrong_flags_are_said_at_length_once(data: Path, model: Path, tmp_path: Path) -> None:
    done = forked(
        *arguments(data, model, tmp_path / "out", "--epochs", "x"), script="eval.py", ranks=2
    )
    assert done.status == 2
    assert done.output.count("usage: eval.py") == 1
    assert (
        len(re.findall("^eval.py: error: .*--epochs: invalid whole number", done.output, re.M)) == 2
    )
    assert done.output.count(f"eval.py: error: rank 1 on {os.uname().nodename}: ") == 1
