"""Damaged data, dead workers, a main process that is stopped: clear errors and no hang."""

import argparse
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from multiprocessing import reduction
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler, get_worker_info

from moco_scale.commands import shard
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading import workers
from moco_scale.data.loading.bad_samples import how_to_check
from moco_scale.data.loading.loader import ViewBatch, evaluation_loader, pretraining_loader
from moco_scale.data.loading.workers import BatchLoader
from moco_scale.data.open import open_shards
from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.shards.protocols import Images
from moco_scale.utils import worker_process
from moco_scale.utils.errors import UserError

AUG = AUGMENTATIONS["cifar"]


def make_shards(source: Path, out: Path) -> IndexedShards:
    parser = argparse.ArgumentParser()
    shard.add_arguments(parser)
    command = ["--source", str(source), "--out", str(out), "--shard-size", "9", "--workers", "1"]
    shard.run(parser.parse_args(command))
    return IndexedShards.open(out, "train")


@pytest.fixture
def damaged(image_folder: Path, tmp_path: Path) -> IndexedShards:
    """24 images, one of them cut off in the middle."""
    victim = image_folder / "train" / "birch" / "003.jpg"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    return make_shards(image_folder, tmp_path / "shards")


def loaders(shards: Images, count: int) -> Iterator[workers.BatchLoader[ViewBatch]]:
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)
    yield pretraining_loader(shards, plan, AUG, 16, num_workers=count, end_step=3)
    yield evaluation_loader(shards, 16, 1.0, batch_size=8, num_workers=count)


@pytest.mark.parametrize("count", [0, 2])
def test_a_damaged_image_is_named_with_a_remedy(damaged: IndexedShards, count: int) -> None:
    for loader in loaders(damaged, count):
        with pytest.raises(UserError) as caught:
            list(loader)
        message = str(caught.value)
        broken = next(where for i in range(24) if (where := damaged.where(i)) in message)
        assert broken.startswith("train-0000")
        assert " at byte " in broken
        assert "(key " in broken
        assert str(damaged.data_dir) in message
        assert "python -m moco_scale shard" in message
        assert "--verify" in message
        assert "Traceback" not in message  # DataLoader pastes a worker's into its own errors
        assert list(loader) == []
    assert multiprocessing.active_children() == []


def test_the_remedy_is_one_for_this_kind_of_data(
    damaged: IndexedShards, image_folder: Path, tmp_path: Path
) -> None:
    """Shards of others cannot be made again from images, and --check reads no pattern."""
    made = damaged.data_dir
    repaired, foreign = (Path(shutil.copytree(made, tmp_path / n)) for n in ("repaired", "foreign"))
    header = json.loads((repaired / "index.json").read_text())
    (repaired / "index.json").write_text(json.dumps({**header, "made": {"repaired": True}}))
    for file in (*foreign.glob("*.npy"), foreign / "index.json"):
        file.unlink()
    pattern = f"{foreign}/train-{{000000..000002}}.tar"
    tar = rf"pack {foreign}/train-00000\d\.tar again without it"
    for spec, remedy, checkable in (
        (str(made), r"make the shards again with `.* --verify --overwrite`", [made]),
        (str(repaired), f"take it out .* shard --repair {repaired}`", [repaired]),
        (str(foreign), tar, [foreign]),
        (pattern, tar, []),
        (f"{foreign},{pattern}", tar, [foreign]),
    ):
        shards = open_shards(spec, "train")
        for loader in loaders(shards, 0):
            with pytest.raises(UserError, match=rf"--bad-samples skip, or {remedy}") as caught:
                list(loader)
            assert ("--source" in str(caught.value)) == (spec == str(made))
        advice = how_to_check(shards)
        assert [f"shard --check {folder}`" in advice for folder in checkable] == [True] * len(
            checkable
        )
        assert advice.count("--check") == max(len(checkable), 1)


def test_the_remedy_works(damaged: IndexedShards, image_folder: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    shard.add_arguments(parser)
    out = damaged.data_dir
    command = ["--source", str(image_folder), "--out", str(out), "--verify", "--overwrite"]
    shard.run(parser.parse_args(command))
    shards = IndexedShards.open(out, "train")
    assert len(shards) == 23
    assert sum(len(batch.index) for batch in evaluation_loader(shards, 16, 1.0, batch_size=8)) == 23


@pytest.mark.parametrize("count", [0, 1])
def test_a_shard_lost_during_the_run_is_named(
    image_folder: Path, tmp_path: Path, count: int
) -> None:
    shards = make_shards(image_folder, tmp_path / "shards")
    lost = sorted(shards.data_dir.glob("train-*.tar"))[1]
    lost.unlink()
    for loader in loaders(shards, count):
        with pytest.raises(UserError, match=lost.name):
            list(loader)


def test_a_killed_worker_is_an_error_not_a_hang(image_folder: Path, tmp_path: Path) -> None:
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)
    loader = pretraining_loader(shards, plan, AUG, 16, num_workers=2, end_step=1000)
    next(loader)
    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    # Until it is dead; nothing may be raised here, in the middle of something else.
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(UserError, match=rf"process {victim.pid}: SIGKILL.*--num-workers"):
        list(loader)
    assert multiprocessing.active_children() == []


def test_after_a_killed_worker_the_main_process_reads_the_rest(
    image_folder: Path, tmp_path: Path
) -> None:
    """So that a run can save and end; the batches are those that it would have read anyway."""
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)
    told: list[str] = []
    batches = partial(pretraining_loader, shards, plan, AUG, 16, end_step=12)
    with batches(num_workers=0) as alone:
        expected = [batch.views for batch in alone]
    with batches(num_workers=1, lost=told.append) as loader:
        found = [next(loader).views]
        (victim,) = multiprocessing.active_children()
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        found += [batch.views for batch in loader]
    assert len(told) == 1 and "SIGKILL" in told[0]
    assert len(found) == 12
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class DiesAsking(Dataset[torch.Tensor]):
    """Its reader is killed while it asks whether its batches are still wanted."""

    def __getitem__(self, job: int) -> torch.Tensor:
        if job == 3 and get_worker_info() is not None:
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:  # torch's loop of a worker
                assert frame.f_back is not None
                frame = frame.f_back
            for asked in (frame.f_locals["done_event"], worker_process._no_longer):
                if lock := getattr(asked, "_cond", None):  # as multiprocessing's has
                    lock.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([job])


def test_a_worker_killed_while_it_asks_leaves_nobody_waiting() -> None:
    told: list[str] = []
    jobs = SequentialSampler(range(8))
    with BatchLoader[torch.Tensor](DiesAsking(), jobs, 2, lost=told.append) as loader:
        assert [int(batch) for batch in loader] == list(range(8))
    assert len(told) == 1 and "SIGKILL" in told[0]


def test_a_stopped_worker_is_not_waited_for(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_GRACE", 0.1)
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)
    loader = pretraining_loader(shards, plan, AUG, 16, num_workers=2, end_step=1000)
    next(loader)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
    loader.close()
    assert multiprocessing.active_children() == []
    assert not Path(loader._sockets).exists()


def test_workers_that_cannot_start_leave_none_behind(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with too low a `ulimit -u`; those that have started ignore SIGTERM."""
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)
    fork, calls = os.fork, count()

    def fork_once() -> int:
        if next(calls):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", fork_once)
    loader = pretraining_loader(shards, plan, AUG, 16, num_workers=3, end_step=3)
    with pytest.raises(UserError, match=r"No more processes can be started.*ulimit -u"):
        next(loader)
    assert next(calls) == 2
    assert multiprocessing.active_children() == []


def test_a_name_of_tmpdir_that_no_socket_can_have(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)
    for length, fits in ((75, True), (76, False), (150, False)):
        folder = "/" + "x" * (length - 1)
        monkeypatch.setattr(tempfile, "gettempdir", lambda folder=folder: folder)
        if fits:
            pretraining_loader(shards, plan, AUG, 16, num_workers=1, end_step=3).close()
            continue
        with pytest.raises(UserError, match=r"TMPDIR, .* too long .* 75 bytes"):
            pretraining_loader(shards, plan, AUG, 16, num_workers=1, end_step=3)


def run_out_of_files(*arguments: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("in_words", [False, True])
def test_a_batch_that_cannot_be_sent_is_not_waited_for(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    in_words: bool,
) -> None:
    """As with few open files: it is lost in a thread of the worker's."""
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), 0), 8)

    def in_torchs_words(_: int) -> NoReturn:
        raise RuntimeError(f"unable to open shared memory </x>: {os.strerror(errno.EMFILE)} (24)")

    monkeypatch.setattr(reduction, "DupFd", in_torchs_words if in_words else run_out_of_files)
    loader = pretraining_loader(shards, plan, AUG, 16, num_workers=1, end_step=3)
    with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
        next(loader)
    assert multiprocessing.active_children() == []
    assert "Traceback" not in capfd.readouterr().err


class ReadsNothing(IndexedShards):
    def read(self, i: int) -> memoryview:
        raise ZeroDivisionError("a defect of the program")


def test_a_defect_keeps_its_type_and_its_traceback(image_folder: Path, tmp_path: Path) -> None:
    shards = make_shards(image_folder, tmp_path / "shards")
    shards.__class__ = ReadsNothing
    loader = evaluation_loader(shards, 16, 1.0, batch_size=8, num_workers=1)
    with pytest.raises(ZeroDivisionError, match="in read"):
        list(loader)


READS_FOR_EVER = """
import multiprocessing, signal, sys
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.loading.loader import pretraining_loader

shards = IndexedShards.open(sys.argv[1])
plan = BatchPlan(FullPermutation(len(shards), 0), 8)
loader = pretraining_loader(shards, plan, AUGMENTATIONS["cifar"], 16, num_workers=2, end_step=10**9)
asked = []
if sys.argv[2] == "patient":
    signal.signal(signal.SIGINT, lambda *_: asked.append(step))
for step, batch in enumerate(loader):
    if step == 3:
        print(len(multiprocessing.active_children()), "workers", flush=True)
    if asked and step == asked[0] + 50:
        print("finished in order")
        loader.close()
"""


@pytest.fixture(params=["ordinary"])
def reading(
    image_folder: Path, tmp_path: Path, repository: Path, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own that reads batches, with two workers that share its output.

    Reading its output to the end therefore waits for the workers too.
    """
    shards = make_shards(image_folder, tmp_path / "shards")
    process = subprocess.Popen(
        [sys.executable, "-c", READS_FOR_EVER, str(shards.data_dir), request.param],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=repository,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "2 workers\n"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


def test_workers_end_when_the_main_process_is_killed(reading: subprocess.Popen[str]) -> None:
    reading.kill()
    _, errors = reading.communicate(timeout=60)  # raises when a worker lives on
    assert errors == ""


def test_ctrl_c_stops_everything_and_only_the_main_process_speaks(
    reading: subprocess.Popen[str],
) -> None:
    os.killpg(reading.pid, signal.SIGINT)
    _, errors = reading.communicate(timeout=60)
    assert reading.returncode != 0
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("reading", ["patient"], indirect=True)
def test_after_ctrl_c_the_main_process_may_read_on(reading: subprocess.Popen[str]) -> None:
    """To finish its step and save; the workers leave the decision to it."""
    os.killpg(reading.pid, signal.SIGINT)
    output, errors = reading.communicate(timeout=60)
    assert (output, errors, reading.returncode) == ("finished in order\n", "", 0)


def test_only_the_loss_of_the_main_process_is_passed_over_in_silence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    worker_process._report_unless_alone(ConnectionResetError, ConnectionResetError(), None)
    assert capsys.readouterr().err == ""
    worker_process._report_unless_alone(ValueError, ValueError("a defect"), None)
    assert "a defect" in capsys.readouterr().err


def test_shards_can_be_sent_to_workers(image_folder: Path, tmp_path: Path) -> None:
    shards = make_shards(image_folder, tmp_path / "shards")
    shards.read(0)
    sent = pickle.loads(pickle.dumps(shards))
    assert bytes(sent.read(5)) == bytes(shards.read(5))
