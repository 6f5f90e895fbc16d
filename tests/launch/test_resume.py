"""Killed at any moment and started again by the same command, a run ends as if nothing happened."""

import json
import os
import random
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    TINY,
    ZERO1,
    Outcome,
    before_each_call,
    forked,
    killed_when,
    launched,
    make_shards,
)
from torch import Tensor

from moco_scale.checkpoints import checkpoint
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.training.run import Run
from moco_scale.utils.errors import STOPPED_EARLY

pytestmark = pytest.mark.timeout(1800)

# Where a kill could do harm: (module, function, what one of its arguments contains).
CRASHES = {
    "the checkpoint is begun": ("moco_scale.checkpoints.checkpoint", "dcp.save", ""),
    "its tensors are written": ("moco_scale.checkpoints.checkpoint", "_complete", ""),
    "it is complete, not pointed at": (
        "moco_scale.checkpoints.run_folder",
        "write_atomically",
        "latest",
    ),
    "it is pointed at, the model is old": (
        "moco_scale.checkpoints.run_folder",
        "save_atomically",
        "current",
    ),
    "an old one is half deleted": ("moco_scale.checkpoints.run_folder", "shutil.rmtree", ".old"),
}


def die_in(module: str, function: str, text: str) -> None:
    """kill -9 this process and its workers where a function is called with such an argument."""

    def die(*args: Any, **kwargs: Any) -> None:
        if any(text in str(a) for a in args):
            os.killpg(0, signal.SIGKILL)

    before_each_call(module, function, die)


def curve(out: Path) -> list[dict[str, Any]]:
    """The logged steps without what depends on the clock."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in [name for name in record if "_second" in name or "slowest_" in name]:
            del record[name]
        del record["data_wait_fraction"]
    return records


def written(out: Path) -> list[tuple[str, int]]:
    """The entries of a folder and when they were last written to."""
    return sorted((p.name, p.stat().st_mtime_ns) for p in out.iterdir() if p.name != ".lock")


def steps_of_checkpoints(out: Path) -> list[int]:
    return sorted(int(p.name[-8:]) for p in (out / "checkpoints").glob("step-*"))


def final_state(out: Path) -> dict[str, Tensor]:
    """Every tensor of current.pth and of the last checkpoint."""
    saved = torch.load(out / "current.pth", weights_only=True)
    last = out / "checkpoints" / f"step-{steps_of_checkpoints(out)[-1]:08d}"
    state = dict(checkpoint.load(last))
    for name in ("model", "model_ema"):
        state |= {f"current.{name}.{k}": t for k, t in saved[name].items()}
    prefixes = ("model.query.", "model.key.", "optimizer.", "queue.", "current.model_ema.")
    assert all(any(k.startswith(p) for k in state) for p in prefixes)
    return state


def assert_same_run(out: Path, reference: Path, *, buffers: bool = True) -> None:
    """Curve and final state agree bit for bit (optionally but for BatchNorm's statistics)."""
    assert curve(out) == curve(reference)
    mine, theirs = final_state(out), final_state(reference)
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    if not buffers:
        statistics = [n for n in differing if "running_" in n]
        for name in statistics:
            torch.testing.assert_close(mine[name], theirs[name])
        differing = sorted(set(differing) - set(statistics))
    assert differing == []


@pytest.fixture(scope="module")
def plain_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("plain") / "out"
    status, output = forked(*TINY, "--data-dir", tiny_shards, "--output-dir", out)
    assert status == 0, output
    return out


def test_one_process_killed_again_and_again(
    plain_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    every_step = ("--checkpoint-freq", 1, "--keep-checkpoints", 1)
    step = random.Random(5).randrange(1, 4)
    killed_when("python", *flags, *every_step, when=lambda line: f"step {step}/8" in line)
    done = (steps_of_checkpoints(tmp_path) or [0])[-1]
    assert step - 2 <= done <= step  # one may be complete and one in the writing
    for when, crash in CRASHES.items():
        status, output = forked(*flags, *every_step, prepare=die_in, prepare_args=crash)
        assert status == -signal.SIGKILL, f"{when}: {output}"
        if done:
            assert f"step-{done:08d} at step {done}" in output, when
        done += crash[0] == "moco_scale.checkpoints.run_folder"
        assert steps_of_checkpoints(tmp_path)[-1:] == ([done] if done else []), when
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed while logging
    # The rest with other workers and other log lines than before.
    status, output = forked(*flags, "--num-workers", 1)
    assert status == 0, output
    assert f"at step {done}" in output
    assert_same_run(tmp_path, plain_run)
    hidden = {p.name for p in tmp_path.rglob(".*")}
    assert hidden == {".metadata", ".lock"}, "a kill left something behind for good"


@pytest.mark.slow
def test_two_processes_under_zero1_killed_twice(
    zero1_run: tuple[Path, str], tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*TINY, *ZERO1, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    crash = ("moco_scale.checkpoints.checkpoint", "_complete", "step-00000004")
    status, _ = forked(*flags, ranks=2, prepare=die_in, prepare_args=crash)
    assert status != 0
    assert steps_of_checkpoints(tmp_path) == [3]
    assert (tmp_path / "checkpoints" / ".step-00000004.tmp").is_dir()
    step = random.Random(7).randrange(5, 8)
    said = killed_when("deepspeed", *flags, when=lambda line: f"step {step}/8" in line)
    assert "step-00000003 at step 3" in said
    status, output = launched("deepspeed", *flags)
    assert status == 0, output
    assert f"step {step + 1}/8" in output
    assert_same_run(tmp_path, zero1_run[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [("torchrun", ()), ("deepspeed", ("--deepspeed", "ds_configs/zero0.json"))],
)
def test_two_processes_under_other_engines(
    launcher: str, engine: tuple[str, ...], tiny_shards: Path, tmp_path: Path
) -> None:
    def flags(out: str) -> list[object]:
        return [
            *(*TINY, *engine, "--checkpoint-freq", 3),
            *("--data-dir", tiny_shards, "--output-dir", tmp_path / out),
        ]

    def succeeds(run: Outcome) -> None:
        assert run.status == 0, run.output

    succeeds(launched(launcher, *flags("reference")))
    step = random.Random(11).randrange(4, 8)
    killed_when(launcher, *flags("killed"), when=lambda line: f"step {step}/8" in line)
    succeeds(launched(launcher, *flags("killed")))
    assert_same_run(tmp_path / "killed", tmp_path / "reference")
    succeeds(launched(launcher, *flags("stopped"), "--max-steps", 5))
    succeeds(launched(launcher, *flags("stopped")))
    # Stopping takes the mean of the ranks' running statistics once more than the reference.
    assert_same_run(tmp_path / "stopped", tmp_path / "reference", buffers=False)


def test_max_steps_stops_and_does_not_change_the_run(
    plain_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, "--max-steps", 3)
    assert status == 0, output
    assert [r["step"] for r in curve(tmp_path)] == [1, 2, 3]
    assert steps_of_checkpoints(tmp_path) == [3]
    status, output = forked(*flags)
    assert status == 0, output
    assert_same_run(tmp_path, plain_run)


def test_a_finished_run_has_nothing_left_to_do(plain_run: Path, tiny_shards: Path) -> None:
    before = (plain_run / "metrics.jsonl").read_bytes()
    status, output = forked(*TINY, "--data-dir", tiny_shards, "--output-dir", plain_run)
    assert status == 0
    assert "nothing left to do" in output
    assert (plain_run / "metrics.jsonl").read_bytes() == before


def test_another_number_of_processes_continues_to_rounding(
    zero1_run: tuple[Path, str], tiny_shards: Path, tmp_path: Path
) -> None:
    """Two processes under DeepSpeed, then one without, with other workers and fewer log lines.

    From the middle of an epoch, two steps before the end: ReLUs amplify the rounding of sums in
    another order by ten and more a step, on some processors beyond the bound in four.
    """
    start = zero1_run[0] / "checkpoints" / "step-00000006"
    flags = ("--data-dir", tiny_shards, "--output-dir", tmp_path, "--resume", start)
    status, output = forked(*TINY, "--num-workers", 1, "--print-freq", 2, *flags)
    assert status == 0, output
    assert f"resumed from {start} at step 6" in output
    ours, theirs = curve(tmp_path), curve(zero1_run[0])
    assert [r["step"] for r in ours] == [8]
    pair = [r["loss"] for r in theirs if r["step"] > 6]
    assert ours[0]["loss"] == pytest.approx(sum(pair) / 2, rel=1e-4)
    mine, other = final_state(tmp_path), final_state(zero1_run[0])
    for name in other:
        if "model" in name:
            torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-4, msg=name)
    assert torch.equal(mine["queue.pointer"], other["queue.pointer"])


def test_another_run_s_flags_are_refused_and_listed(
    plain_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    before = written(plain_run)
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", plain_run)
    status, output = forked(*flags, "--base-lr", 0.5, "--nce-t", 0.2, "--print-freq", 3)
    assert status == 2
    assert "--base-lr: 0.1 in the run, 0.5 now" in output
    assert "--nce-t: 0.07 in the run, 0.2 now" in output
    assert "print-freq" not in output
    assert "another --output-dir" in output
    assert "Traceback" not in output
    # The same images in another order are other data.
    other = make_shards(tiny_shards.parent / "images", tmp_path / "shards", "--seed", "1")
    status, output = forked(*flags, "--data-dir", other)
    assert status == 2
    assert f"--data-dir: other images in {other} now" in output
    assert written(plain_run) == before


def test_moved_images_are_the_same_images(
    plain_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(tiny_shards)
    flags = ("--data-dir", tmp_path / "moved", "--output-dir", plain_run)
    status, output = forked(*TINY, *flags)
    assert status == 0, output
    assert "nothing left to do" in output


def signal_at(step: int, rank: int, *numbers: int) -> None:
    """Let this process send itself signals in the given step, if it is that rank."""

    def send(run: Run, batch: ViewBatch) -> None:
        if run.step + 1 == step and run.rank == rank:
            for number in numbers:
                os.kill(os.getpid(), number)

    before_each_call("moco_scale.training.loop", "train_step", send)


def end_in_evaluation(call: int, how: str, rank: int = 0) -> None:
    """Let something happen to this process in its n-th kNN evaluation, if it is that rank."""
    calls = count(1)

    def end(*args: Any, **kwargs: Any) -> None:
        if next(calls) == call and int(os.environ.get("RANK", "0")) == rank:
            if how == "kill":
                os.killpg(0, signal.SIGKILL)
            if how == "raise":
                raise ZeroDivisionError("in the evaluation")
            os.kill(os.getpid(), signal.SIGTERM)

    before_each_call("moco_scale.evaluation.knn", "KnnMonitor.measure", end)


def test_an_evaluation_that_fails_loses_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    """Each epoch's kNN is in the log once, whatever ended the process that was to measure it."""
    flags = (*TINY, "--knn-freq", 1, "--data-dir", tiny_shards)
    status, output = forked(*flags, "--output-dir", tmp_path / "reference")
    assert status == 0, output
    out = tmp_path / "out"
    flags = (*flags, "--output-dir", out)
    status, output = forked(*flags, prepare=end_in_evaluation, prepare_args=(2, "raise"))
    assert "ZeroDivisionError: in the evaluation" in output
    assert steps_of_checkpoints(out) == [4]
    assert [r["step"] for r in curve(out)] == [1, 2, 3]
    status, output = forked(*flags, prepare=end_in_evaluation, prepare_args=(1, "signal"))
    assert status == STOPPED_EARLY, output
    assert "the evaluation after step 4 is still to be done" in output
    assert "SIGTERM: stopped after step 4 of 8" in output
    assert [r["step"] for r in curve(out)] == [1, 2, 3]
    status, output = forked(*flags, prepare=end_in_evaluation, prepare_args=(2, "kill"))
    assert status == -signal.SIGKILL, output
    assert steps_of_checkpoints(out)[-1] == 8
    assert [r["step"] for r in curve(out)] == [1, 2, 3, 4, 5, 6, 7]
    status, output = forked(*flags)
    assert status == 0, output
    assert "nothing left to do" in output
    assert_same_run(out, tmp_path / "reference")
    assert (out / "neighbours.png").exists()
    # Elsewhere the step belongs to this run's log.
    start = ("--resume", out / "checkpoints" / "step-00000004", "--output-dir", tmp_path / "other")
    status, output = forked(*flags, *start, "--max-steps", 5)
    assert status == 0, output
    assert [r["step"] for r in curve(tmp_path / "other")] == [5]


def die_when_saved(step: int) -> None:
    """kill -9 this process as soon as the checkpoint of a step is complete."""
    original = checkpoint.save

    def save(folder: Path, *args: Any) -> None:
        original(folder, *args)
        if folder.name == f"step-{step:08d}":
            os.killpg(0, signal.SIGKILL)

    checkpoint.save = save  # type: ignore[assignment]


def test_a_kill_as_the_last_checkpoint_is_complete(
    plain_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Nothing is left to do then but to write the model for evaluation."""
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, prepare=die_when_saved, prepare_args=(8,))
    assert status == -signal.SIGKILL, output
    assert steps_of_checkpoints(tmp_path)[-1] == 8
    assert torch.load(tmp_path / "current.pth")["step"] == 4
    status, output = forked(*flags)
    assert status == 0 and "nothing left to do" in output, output
    assert_same_run(tmp_path, plain_run)


@pytest.mark.slow
def test_a_stop_that_is_agreed_at_an_epoch_s_end_waits_for_no_evaluation(
    zero1_run: tuple[Path, str], tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*TINY, *ZERO1, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, ranks=2, prepare=signal_at, prepare_args=(3, 1, signal.SIGTERM))
    assert status == STOPPED_EARLY, output
    assert "SIGTERM: stopped after step 4 of 8" in output
    assert [r["step"] for r in curve(tmp_path)] == [1, 2, 3]
    # In the evaluation that is then made up for, one rank's signal stops both.
    prepare_args = (1, "signal", 1)
    status, output = forked(*flags, ranks=2, prepare=end_in_evaluation, prepare_args=prepare_args)
    assert status == STOPPED_EARLY, output
    assert [r["step"] for r in curve(tmp_path)] == [1, 2, 3]
    status, output = forked(*flags, ranks=2)
    assert status == 0, output
    assert_same_run(tmp_path, zero1_run[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(
    plain_run: Path, tiny_shards: Path, tmp_path: Path, number: int
) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path, "--num-workers", 1)
    # Launchers often pass on what the whole group got: twice at once is one signal.
    status, output = forked(*flags, prepare=signal_at, prepare_args=(3, 0, number, number))
    assert status == STOPPED_EARLY, output
    assert f"{signal.Signals(number).name}: stopped after step 3 of 8" in output
    assert "Traceback" not in output
    assert steps_of_checkpoints(tmp_path) == [3]
    status, output = forked(*flags)
    assert status == 0, output
    assert_same_run(tmp_path, plain_run)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    zero1_run: tuple[Path, str], tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*TINY, *ZERO1, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    prepare_args = (5, 1, signal.SIGUSR1)
    status, output = forked(*flags, ranks=2, prepare=signal_at, prepare_args=prepare_args)
    assert status == STOPPED_EARLY, output
    assert output.count("SIGUSR1: stopped after step 6 of 8") == 1
    assert steps_of_checkpoints(tmp_path)[-1] == 6
    status, output = forked(*flags, ranks=2)
    assert status == 0, output
    assert_same_run(tmp_path, zero1_run[0])


def test_a_time_limit_stops_a_run_that_goes_on_later(
    plain_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, "--max-time", 1e-9)
    assert status == STOPPED_EARLY, output
    assert "--max-time is over: stopped after step 1 of 8" in output
    status, output = forked(*flags, "--max-time", 10)
    assert status == 0, output
    assert_same_run(tmp_path, plain_run)


OTHERS = (
    (1, ()),
    (2, ("--engine", "fsdp")),
    (4, ("--deepspeed", "ds_configs/zero3.json")),
    (2, ("--deepspeed", "ds_configs/zero2.json")),
)


# Rounding grows from step to step, the faster the larger the steps are, and the fewer pixels a
# BatchNorm group has in the last layers.
GENTLE = (*TINY, "--base-lr", 0.001, "--image-size", 48)


@pytest.fixture(scope="module")
def gentle_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process with small steps."""
    out = tmp_path_factory.mktemp("gentle") / "out"
    status, output = forked(*GENTLE, "--data-dir", tiny_shards, "--output-dir", out)
    assert status == 0, output
    return out


@pytest.mark.parametrize("first", [pytest.param(n, marks=pytest.mark.slow) for n in range(4)])
def test_a_checkpoint_is_resumed_under_any_engine_on_any_number_of_processes(
    gentle_run: Path, tiny_shards: Path, tmp_path: Path, first: int
) -> None:
    """Each engine hands over to the next in mid-epoch; the curve is that of one process."""
    flags = (*GENTLE, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    for turn, last in enumerate((2, 5, 8)):
        world, engine = OTHERS[(first + turn) % len(OTHERS)]
        status, output = forked(*flags, *engine, "--max-steps", last, ranks=world)
        assert status == 0, output
        assert steps_of_checkpoints(tmp_path)[-1] == last
    mine, theirs = ([r["loss"] for r in curve(out)] for out in (tmp_path, gentle_run))
    assert mine == pytest.approx(theirs, rel=5e-3)
    got, wanted = final_state(tmp_path), final_state(gentle_run)
    assert got.keys() == wanted.keys()
    assert int(got["queue.pointer"]) == int(wanted["queue.pointer"])
    assert (got["queue.keys"] * wanted["queue.keys"]).sum(1).min() > 1 - 1e-4
    for name in (n for n in wanted if n.endswith("momentum_buffer")):
        error = (got[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
        assert error < 0.2, name
