"""A ConvNeXt with stochastic depth is the same run on one process and on two."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import TINY
from harness import run_ranks
from torch import Tensor

from moco_scale.config import command_line
from moco_scale.models.encoder import Encoder
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

STEPS = 3
FLAGS = (*TINY, "--model", "convnext_tiny", "--patch-size", "2", "--symmetric", "--base-lr", "0.3")


class Lively(Run):
    """A run whose branches count from the beginning; as drawn they are multiplied by 1e-6."""

    def initial_encoder(self) -> Encoder:
        encoder = super().initial_encoder()
        for name, p in encoder.named_parameters():
            if name.endswith("layer_scale"):
                p.data.fill_(0.5)
        return encoder


class Seen(NamedTuple):
    """Losses of this rank, the queue and some of the weights."""

    losses: list[float]
    queue: Tensor
    weights: dict[str, Tensor]


def one_rank(flags: list[str]) -> Seen:
    run = Lively(command_line.parse(flags))
    losses: list[float] = []
    record = run.watch.record

    def note(step: int, loss: Tensor, weights_finite: Tensor, skipped: bool) -> None:
        losses.append(float(loss))
        record(step, loss, weights_finite, skipped)

    run.watch.record = note  # type: ignore[method-assign]
    run.engine.moco.train()
    for batch in run.loader(STEPS):
        train_step(run, batch)
    state = run.engine.model_state(lambda name: "layer_scale" in name or ".head." in name)
    return Seen([total / run.micro_batches for total in losses], run.queue.keys.clone(), state)


@pytest.fixture(scope="module")
def one_process(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    out = tmp_path_factory.mktemp("convnext")
    flags = [*FLAGS, "--data-dir", str(tiny_shards), "--output-dir", str(out)]
    return run_ranks(one_rank, 1, flags)[0]


@pytest.mark.parametrize(
    "more",
    [
        ("--accumulation-steps", "2", "--activation-checkpointing"),
        pytest.param(("--engine", "fsdp"), marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp"],
)
def test_two_processes_make_the_run_of_one(
    more: tuple[str, ...], one_process: Seen, tiny_shards: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, *more, "--data-dir", str(tiny_shards), "--output-dir", str(tmp_path / "out")]
    ranks = run_ranks(one_rank, 2, flags)
    losses = torch.tensor([seen.losses for seen in ranks], dtype=torch.float64).mean(0)
    assert losses.tolist() == pytest.approx(one_process.losses, rel=1e-4)
    for seen in ranks:
        torch.testing.assert_close(seen.queue, one_process.queue, rtol=1e-3, atol=1e-5)
        for name, wanted in one_process.weights.items():
            torch.testing.assert_close(seen.weights[name], wanted, rtol=1e-3, atol=1e-5)
