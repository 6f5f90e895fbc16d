"""A rank that is killed, frozen or stuck: every other says which and where, and ends."""

import json
import os
import re
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import torch
from commands import TINY, Ranks, before_each_call, forked, forked_ranks

from moco_scale.data.loading.loader import ViewBatch
from moco_scale.models.encoder import build_encoder
from moco_scale.training.run import Run
from moco_scale.utils.errors import LOST_PEER

pytestmark = pytest.mark.timeout(1800)

HOST = os.uname().nodename


def break_at(step: int, phase: str, rank: int, how: str) -> None:
    """Let one rank come to harm as soon as it has entered a phase of a step."""
    from moco_scale.observe.phases import Phases, Position
    from moco_scale.observe.watchdog import Watch

    enter, beat = Phases.enter, Watch._beat
    told: list[Position] = []

    def beat_and_note(self: Watch) -> None:
        told.append(self._phases.now)
        beat(self)

    def enter_and_break(self: Phases, entered: str, number: int | None = None) -> None:
        enter(self, entered, number)
        here = self.now.step == step and entered == phase
        if here and int(os.environ["RANK"]) == rank:
            while not any(p.step == step and p.phase == phase for p in told[:-1]):
                time.sleep(0.01)  # until others can know
            if how == "stuck":
                time.sleep(1e6)
            elif how == "error":
                raise ZeroDivisionError("a defect of one rank")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    Phases.enter = enter_and_break  # type: ignore[method-assign, assignment]
    Watch._beat = beat_and_note  # type: ignore[method-assign]


def job(data: Path, out: Path, *how: object, ranks: int = 2) -> AbstractContextManager[Ranks]:
    flags = (*TINY, "--hang-timeout", 6, "--data-dir", data, "--output-dir", out)
    return forked_ranks(*flags, ranks=ranks, prepare=break_at, prepare_args=how)


def said(run: Ranks, rank: int, program: str = "train.py") -> str:
    """The line in which a rank says why it stops."""
    # Not at the beginning of a line: torch's warnings may be there, written piece by piece.
    lines = re.findall(rf"{re.escape(program)}: rank {rank} on {HOST} stops.*", run.output())
    assert len(lines) == 1, run.output()
    assert "Traceback" not in run.output()
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(tiny_shards: Path, tmp_path: Path, victim: int) -> None:
    with job(tiny_shards, tmp_path, 3, "forward", victim, "killed") as run:
        other = 1 - victim
        assert run.status(other) == LOST_PEER, run.output()
        assert run.status(victim) == -signal.SIGKILL
    line = said(run, other)
    assert "stops in phase shuffle of step 3: " in line
    assert f"rank {victim} on {HOST}" in line
    assert line.endswith("(frozen, dead or cut off) in phase forward of step 3"), line


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_rank(tiny_shards: Path, tmp_path: Path, victim: int) -> None:
    """Nothing breaks, and nothing comes: the time-out ends it. So it does when it thaws."""
    with job(tiny_shards, tmp_path, 4, "backward", victim, "frozen") as run:
        other = 1 - victim
        assert run.status(other) == LOST_PEER, run.output()
        frozen = psutil.Process(run.processes[victim].pid)
        assert frozen.status() == psutil.STATUS_STOPPED
        frozen.resume()
        assert run.status(victim) == LOST_PEER, run.output()
    line = said(run, other)
    stood = r"stops after \d+ s in phase backward: sum over ranks of step 4"
    assert re.search(stood, line), line
    assert f"rank {victim} on {HOST}" in line
    assert line.endswith("(frozen, dead or cut off) in phase backward of step 4"), line
    said(run, victim)
    (folder,) = (tmp_path / "hangs").iterdir()
    report = (folder / f"rank-{other:05d}.txt").read_text()
    assert line in report
    assert "train_step" in report
    assert (folder / f"flight_rank_{other}").stat().st_size > 0


def test_a_rank_that_is_alive_and_stuck(tiny_shards: Path, tmp_path: Path) -> None:
    with job(tiny_shards, tmp_path, 3, "data", 1, "stuck") as run:
        assert [run.status(rank) for rank in (0, 1)] == [LOST_PEER, LOST_PEER], run.output()
    for rank in (0, 1):
        stands = rf"rank 1 on {HOST} stands in phase data of step 3 for \d+ s and is alive; "
        waits = "the others wait for it in phase shuffle of step 3"
        assert re.search(stands + waits, said(run, rank)), run.output()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file as pretraining writes it."""
    state = build_encoder("resnet18", dim=8).state_dict()
    opt = {"model": "resnet18", "model_width": 1, "stem": "imagenet", "head": "linear", "dim": 8}
    opt |= {"dataset": "images", "image_size": 32}
    torch.save({"opt": opt, "model": state, "model_ema": state}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def break_evaluation(rank: int, how: str) -> None:
    """Let one rank come to harm in the middle of an evaluation, once others can know of it."""
    from moco_scale.evaluation.features import Pixels
    from moco_scale.observe.watchdog import Watch

    normalise, talk = Pixels.normalise, Watch._talk
    rounds: list[int] = []
    broken: list[bool] = []

    def talk_and_count(self: Watch) -> None:
        talk(self)
        rounds.append(1)

    def normalise_and_break(self: Pixels, crops: torch.Tensor) -> torch.Tensor:
        if int(os.environ["RANK"]) == rank and not broken:
            while len(rounds) < 3:
                time.sleep(0.01)
            broken.append(True)
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return normalise(self, crops)

    Pixels.normalise = normalise_and_break  # type: ignore[method-assign]
    Watch._talk = talk_and_count  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("protocol", "how"),
    [
        ("knn", "killed"),
        pytest.param("knn", "frozen", marks=pytest.mark.slow),
        ("linear", "frozen"),
    ],
)
def test_a_rank_that_an_evaluation_loses(
    tiny_shards: Path, model: Path, tmp_path: Path, protocol: str, how: str
) -> None:
    flags = ("--protocol", protocol, "--batch-size", 8, "--num-workers", 0, "--device", "cpu")
    time_out = ("--hang-timeout", 6, "--data-dir", tiny_shards)
    files = ("--pretrained-model", model, "--output-dir", tmp_path / "out")
    harm = {"prepare": break_evaluation, "prepare_args": (1, how)}
    with forked_ranks(*flags, *time_out, *files, ranks=2, script="eval.py", **harm) as run:  # type: ignore[arg-type]
        assert run.status(0) == LOST_PEER, run.output()
        if how == "frozen":
            psutil.Process(run.processes[1].pid).resume()
            assert run.status(1) == LOST_PEER, run.output()
    line = said(run, 0, "eval.py")
    assert f"rank 1 on {HOST} was last seen at " in line
    assert line.endswith("(frozen, dead or cut off) in phase evaluation"), line
    assert not (tmp_path / "out" / "results.json").exists()


def go_astray(what: str, step: int, rank: int) -> None:
    """Let one rank's state differ from the others' before a step."""

    def lead_astray(run: Run, batch: ViewBatch) -> None:
        if batch.step + 1 == step and run.rank == rank:
            if what == "queue pointer":
                run.queue.pointer += 1
            else:
                torch._foreach_mul_(run.engine.replicated()["key"], 1.001)

    before_each_call("moco_scale.training.loop", "train_step", lead_astray)


@pytest.mark.parametrize(
    ("what", "flags"),
    [
        ("queue pointer", ("--sync-check-freq", 3)),
        ("weights of the key encoder", ("--deepspeed", "ds_configs/zero1.json")),
    ],
)
def test_a_rank_that_goes_astray(
    tiny_shards: Path, tmp_path: Path, what: str, flags: tuple[object, ...]
) -> None:
    """It is noticed at the check that is due, or before a checkpoint is written of it."""
    out = ("--data-dir", tiny_shards, "--output-dir", tmp_path)
    arguments = (*TINY, *out, *flags)
    run = forked(*arguments, ranks=2, prepare=go_astray, prepare_args=(what, 3, 1))
    assert run.status == LOST_PEER, run.output
    assert "Traceback" not in run.output
    step = 3 if "--sync-check-freq" in flags else 4
    (*_, said) = re.findall(rf"after step {step} the ranks are no longer .*$", run.output, re.M)
    assert re.search(rf"{what}: rank 0 on {HOST} has -?\d+, rank 1 on {HOST} has -?\d+", said), said
    assert "batches read" not in said
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def dawdle(rank: int, phase: str) -> None:
    """Let one rank report more time in a phase than it has spent."""
    from moco_scale.observe.phases import Phases

    worked = Phases.worked

    def longer(self: Phases) -> dict[str, float]:
        more = 1000.0 if int(os.environ["RANK"]) == rank else 0.0
        spent = worked(self)
        return spent | {phase: spent[phase] + more}

    Phases.worked = longer  # type: ignore[method-assign]


def test_a_straggler_is_named_in_the_log(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--max-steps", 4, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    run = forked(*flags, ranks=2, prepare=dawdle, prepare_args=(1, "data"))
    assert run.status == 0, run.output
    slow = rf"rank 1 on {HOST} keeps the others waiting: .* longer in data, 1000\.\d+ s against 0\."
    assert len(re.findall(slow, (tmp_path / "log.txt").read_text())) == 1
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["slowest_rank"] == 1
        assert record["data_wait_seconds_max"] > 999 > record["data_wait_seconds_median"] >= 0
        assert record["step_seconds_max"] > 999 > record["step_seconds_min"] > 0


def test_a_rank_that_ends_by_an_error_of_its_own(tiny_shards: Path, tmp_path: Path) -> None:
    with job(tiny_shards, tmp_path, 2, "EMA", 1, "error") as run:
        assert run.status(0) == LOST_PEER, run.output()
        assert run.status(1) not in (0, LOST_PEER)
    reason = "ZeroDivisionError('a defect of one rank')"
    assert f"rank 1 on {HOST} ended in phase EMA of step 2: {reason}" in run.output()
