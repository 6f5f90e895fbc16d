"""Output that cannot be written or gone on from: one message, and what was saved stays."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, before_each_call, flags_for, forked

from moco_scale.checkpoints import checkpoint
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.training.run import Run

pytestmark = pytest.mark.timeout(1800)


def test_output_below_a_file(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = forked(*flags_for(tiny_shards, tmp_path / "file" / "out"), ranks=2)
    assert_refused(run, "--output-dir", tmp_path / "file" / "out")
    run = forked(*flags_for(tiny_shards, tmp_path / "file"))
    assert_refused(run, "--output-dir", "is a file")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with the options given, for root only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a file system needs root and `mount`")
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this machine does not let root mount a file system")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_output_on_a_read_only_disk(mount: Callable[[str], Path], tiny_shards: Path) -> None:
    out = mount("ro,size=1m") / "out"
    assert_refused(forked(*flags_for(tiny_shards, out)), out, "Read-only file system")


def test_a_full_disk_while_saving(mount: Callable[[str], Path], tiny_shards: Path) -> None:
    """Room for one checkpoint and the model, not for two: resnet18 takes 134 and 90 MB."""
    disk = mount("size=300m")
    out = disk / "out"
    flags = (*flags_for(tiny_shards, out), "--checkpoint-freq", 1, "--max-steps", 2)
    run = forked(*flags, ranks=2)
    assert_refused(run, "No space left on device", out / "checkpoints", "untouched")
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000001", "latest"}
    assert int(checkpoint.load(out / "checkpoints" / "step-00000001")["queue.enqueued"]) == 8
    assert torch.load(out / "current.pth", weights_only=True)["step"] == 1
    subprocess.run(["mount", "-o", "remount,size=700m", str(disk)], check=True)
    run = forked(*flags, ranks=2)
    assert run.status == 0, run.output
    assert "step-00000001 at step 1" in run.output
    assert (out / "checkpoints" / "latest").read_text() == "step-00000002\n"


def fail_to_save(where: str) -> None:
    """Let rank 1 meet an error while the ranks write their first checkpoint."""
    from torch.distributed.checkpoint import FileSystemWriter

    def disk_error(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def defect(*arguments: Any) -> Any:
        raise ZeroDivisionError("so it goes")

    if os.environ["RANK"] == "1":
        if where == "writing":
            FileSystemWriter.write_data = disk_error  # type: ignore[method-assign,assignment]
        else:
            checkpoint.RowsSavePlanner = defect  # type: ignore[misc,assignment]

    def wait(run: Run, batch: ViewBatch) -> None:
        deadline = time.monotonic() + 60
        while batch.step == 2 and not run.folder.save_failed():  # begun after the second step
            assert time.monotonic() < deadline
            time.sleep(0.01)

    before_each_call("moco_scale.training.loop", "train_step", wait)


@pytest.mark.parametrize("where", ["writing", "beginning"])
def test_a_save_that_fails_beside_the_loop_stops_all_ranks_soon(
    tiny_shards: Path, tmp_path: Path, where: str
) -> None:
    """Whatever one rank meets, no other waits for it, nor does the run for its next save."""
    flags = (*flags_for(tiny_shards, tmp_path), "--checkpoint-freq", 2)
    flags = (*flags, "--epochs", 1, "--batch-size", 4, "--bn-group-size", 2)
    run = forked(*flags, ranks=2, prepare=fail_to_save, prepare_args=(where,))
    assert run.status == 2, run.output
    reason = "Input/output error" if where == "writing" else "ZeroDivisionError: so it goes"
    place = "" if where == "writing" else r"rank 1 on \S+: "
    text = rf"{place}cannot write the checkpoint {tmp_path}/checkpoints: {reason}"
    assert re.search(rf"^train.py: error: {text}", run.output, re.MULTILINE), run.output
    assert re.search(rf"saving has failed, so the run will stop: {text}", run.output)
    assert ("Traceback" in run.output) == (where == "beginning")  # a defect is shown as one
    assert not list((tmp_path / "checkpoints").glob("*step-*"))
    # Known after step 3, heard by all after step 4, where the next save would have been due.
    assert re.findall(r"step (\d+)/8", run.output) == ["1", "2", "3"], run.output


def test_logs_that_cannot_be_written_end_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    """Their disk is full, or something stands in the way of each."""
    for name in ("log.txt", "metrics.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    (tmp_path / "tensorboard").write_text("")
    for name in ("report.png", "neighbours.png"):
        (tmp_path / name).mkdir()
    run = forked(*flags_for(tiny_shards, tmp_path), "--max-steps", 3, "--print-freq", 1)
    assert run.status == 0 and "Traceback" not in run.output, run.output
    for name in ("log.txt", "metrics.jsonl", "tensorboard/events"):
        assert run.output.count(f"cannot write {tmp_path}/{name}") == 1, run.output
        assert re.search(rf"{tmp_path}/{name}\S*: \d+ entries .* are lost", run.output), run.output
    for name in ("report.png", "neighbours.png"):
        assert f"no {name}, which the same command draws: cannot" in run.output
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"


def remove_folder(out: str) -> None:
    """Remove the folder of a run after its second step."""

    def remove(run: Run, batch: ViewBatch) -> None:
        if batch.step == 2 and run.rank == 0:
            run.folder.finish_saving()  # what is being written would fail
            shutil.rmtree(out)

    before_each_call("moco_scale.training.loop", "train_step", remove)


def test_a_folder_that_is_removed_under_a_run(tiny_shards: Path, tmp_path: Path) -> None:
    """The run makes it again and goes on; what follows can be resumed from."""
    out = tmp_path / "runs" / "out"
    flags = (*flags_for(tiny_shards, out), "--checkpoint-freq", 1, "--print-freq", 1)
    run = forked(
        *(*flags, "--max-steps", 3), ranks=2, prepare=remove_folder, prepare_args=(str(out.parent),)
    )
    assert run.status == 0 and "Traceback" not in run.output, run.output
    assert run.output.count(f"--output-dir {out} was removed during the run") == 1, run.output
    assert {p.name for p in out.iterdir()} == {
        *(".lock", "checkpoints", "config.json", "current.pth", "log.txt", "metrics.jsonl"),
        *("neighbours.png", "report.png", "tensorboard"),
    }
    run = forked(*flags, "--max-steps", 4, ranks=2)
    assert run.status == 0 and "at step 3" in run.output, run.output
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4]


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def stopped_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after one step."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    run = forked(*flags_for(tiny_shards, out), "--max-steps", 1)
    assert run.status == 0, run.output
    return out


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of it. Files are links: replace them, do not write into them."""
    copy = shutil.copytree(stopped_run, tmp_path / "out", copy_function=os.link)
    for name in ("log.txt", "metrics.jsonl"):
        (copy / name).unlink()
        shutil.copy(stopped_run / name, copy / name)
    return copy


def test_a_write_that_fails_while_saving(stopped: Path, tiny_shards: Path) -> None:
    """Any user can have this one: files may not grow beyond 50 MB."""
    flags = (*flags_for(tiny_shards, stopped), "--max-steps", 2)
    run = forked(*flags, prepare=limit_files, prepare_args=(50 << 20,))
    assert_refused(run, stopped / "checkpoints", "untouched")
    folder = stopped / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"step-00000001", "latest"}
    run = forked(*flags)
    assert run.status == 0, run.output
    assert "at step 1" in run.output
    assert (folder / "latest").read_text() == "step-00000002\n"


def test_a_damaged_checkpoint(stopped: Path, tiny_shards: Path) -> None:
    flags = flags_for(tiny_shards, stopped)
    folder = stopped / "checkpoints" / "step-00000001"
    (tensors,) = folder.glob("*.distcp")
    content = tensors.read_bytes()
    tensors.unlink()
    tensors.write_bytes(content[: len(content) // 2])
    assert_refused(forked(*flags), folder, "is damaged", tensors.name)
    tensors.write_bytes(bytes(len(content)))  # the right length, as after a crash of the machine
    words = ("is damaged", tensors.name, "not what was written", "move", "away to start over")
    assert_refused(forked(*flags), folder, *words)


def test_resuming_from_what_is_no_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    flags = flags_for(tiny_shards, tmp_path / "out")
    missing = tmp_path / "missing"
    assert_refused(forked(*flags, "--resume", missing), missing, "no such folder")
    assert_refused(
        forked(*flags, "--resume", tiny_shards), tiny_shards, "is incomplete, or not of moco_scale"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_run(stopped: Path, tiny_shards: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(tiny_shards, stopped), "--resume", "none")
    assert_refused(run, "--resume none", stopped, "already holds a run")
    other = tmp_path / "other"
    flags = flags_for(tiny_shards, other)
    other.mkdir()
    (other / "current.pth").write_bytes(b"a model of somebody's")
    run = forked(*flags)
    assert_refused(run, other, "holds a model but no checkpoint")
    assert (other / "current.pth").read_bytes() == b"a model of somebody's"
