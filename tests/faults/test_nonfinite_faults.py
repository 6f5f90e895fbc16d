"""Numbers that go wrong in training: said where and when, never saved, and the end of the run."""

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, before_each_call, flags_for, forked

from moco_scale.data.loading.loader import ViewBatch
from moco_scale.training.run import Run

pytestmark = pytest.mark.timeout(1800)


def spoil(where: str, first: int, last: int, rank: int) -> None:
    """Let one rank's loss, or what its backward pass starts from, be no number in some steps."""
    from moco_scale.engines.ddp import DDPEngine
    from moco_scale.methods.key_queue import KeyQueue

    now = {"step": 0}
    contrast, backward = KeyQueue.contrast, DDPEngine._backward

    def bad() -> bool:
        return first <= now["step"] <= last and int(os.environ.get("RANK", "0")) == rank

    def count(run: Run, batch: ViewBatch) -> None:
        now["step"] = batch.step + 1

    def lossy(*arguments: Any) -> Any:
        result = contrast(*arguments)
        return result._replace(loss=result.loss * math.nan) if bad() else result

    def steep(self: DDPEngine, loss: torch.Tensor) -> None:
        backward(self, loss * math.inf if bad() else loss)

    before_each_call("moco_scale.training.loop", "train_step", count)
    if where == "loss":
        KeyQueue.contrast = lossy  # type: ignore[method-assign,assignment]
    else:
        DDPEngine._backward = steep  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("where", "said"), [("loss", "its loss"), ("gradient", "the weights after it")]
)
def test_numbers_that_go_wrong_are_named_and_end_the_run(
    tiny_shards: Path, tmp_path: Path, where: str, said: str
) -> None:
    flags = (*flags_for(tiny_shards, tmp_path), "--max-nonfinite", 2, "--no-async-save")
    run = forked(*flags, ranks=2, prepare=spoil, prepare_args=(where, 5, 99, 1))
    good = tmp_path / "checkpoints" / "step-00000004"
    words = ("stopped at step 8: not finite in 2 steps in a row (on rank 1: its loss)", "--base-lr")
    assert_refused(run, *words, f"last good checkpoint: {good}")
    first = rf"rank 1 on \S+: step 5 is not finite: {said}; last good checkpoint: {good}\n"
    assert re.search(first, run.output), run.output
    assert run.output.count(" is not finite: ") == 2
    assert [c.name for c in (tmp_path / "checkpoints").glob("step-*")] == [good.name]


def test_what_is_not_finite_is_not_saved(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*flags_for(tiny_shards, tmp_path), "--checkpoint-freq", 3)
    run = forked(*flags, prepare=spoil, prepare_args=("gradient", 4, 4, 0))
    words = "stopped at step 4: not finite: the weights after it"
    assert_refused(run, words, tmp_path / "checkpoints" / "step-00000003")
    assert [c.name for c in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.slow
def test_an_overflow_of_fp16_is_no_such_step(tiny_shards: Path, tmp_path: Path) -> None:
    """fp16 leaves out a step for any gradient that is not finite; a loss that is none counts."""
    flags = (*flags_for(tiny_shards, tmp_path), "--precision", "fp16")
    run = forked(*flags, prepare=spoil, prepare_args=("loss", 3, 4, 0))
    assert run.status == 0, run.output
    assert run.output.count("is not finite") == 1
    run = forked(*flags, "--output-dir", tmp_path / "other", "--max-nonfinite", 2,
                 prepare=spoil, prepare_args=("loss", 3, 4, 0))  # fmt: skip
    assert_refused(run, "not finite in 2 steps in a row (on rank 0: its loss)")
    run = forked(*flags, "--output-dir", tmp_path / "third", "--max-nonfinite", 1,
                 prepare=spoil, prepare_args=("gradient", 3, 4, 0))  # fmt: skip
    assert run.status == 0, run.output
    assert "is not finite" not in run.output
