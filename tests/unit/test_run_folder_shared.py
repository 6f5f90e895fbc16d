"""An output folder that others lock, fill or remove."""

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import folder, refusal, save, steps

from moco_scale.checkpoints import checkpoint, run_folder
from moco_scale.checkpoints.run_folder import RunFolder
from moco_scale.distributed import run_lock
from moco_scale.distributed.run_lock import RunLock
from moco_scale.observe import side_files
from moco_scale.utils.errors import StoppedEarly, UserError


@contextlib.contextmanager
def locked_by(path: Path, mark: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock; killed at the end."""
    program = f"""
import fcntl, sys
lock = open({str(path)!r}, "w", encoding="utf-8", errors="surrogateescape")
fcntl.lockf(lock, fcntl.LOCK_EX)
print({mark!r}, end="", file=lock, flush=True)
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        yield other
        other.kill()


def test_a_folder_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    here = f"{socket.gethostname()} 123 0123456789abcdef\n"
    junk = "\udcff\udcfe"  # bytes that are no UTF-8
    named = f" (process 123 on {socket.gethostname()})"
    for mark, holder in (("", ""), (junk, ""), (here, named)):
        with locked_by(tmp_path / ".lock", mark):
            message = refusal(folder(tmp_path))
            assert f"is being written by another run{holder}; wait" in message
    assert folder(tmp_path).prepare() is None  # a killed run leaves no lock


class Clock:
    """Time that passes only while something sleeps."""

    def __init__(self, wake_after: float, then: Callable[[], None]) -> None:
        self.now, self._wake_after, self._then = 1000.0, 1000.0 + wake_after, then

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self._wake_after:
            self._then()
            self._wake_after = float("inf")


@pytest.mark.parametrize("lease", [60.0, 119.0, 1e9])
def test_the_lock_of_a_host_that_may_have_died_is_waited_for(
    tmp_path: Path, lease: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over NFS such a lock lasts until the server takes it away from the client."""
    with locked_by(tmp_path / ".lock", "node7 123 0123456789abcdef\n") as other:

        def die() -> None:
            other.kill()
            other.wait()

        clock = Clock(lease, die)
        lock = RunLock(tmp_path / ".lock", "node8", lambda: clock.now, clock.sleep)
        if lease < run_lock.LEASE:
            lock.claim()
            assert (tmp_path / ".lock").read_text() == lock.mark
            assert lease <= clock.now - 1000 <= lease + 5
        else:
            with pytest.raises(StoppedEarly, match=r"another run \(process 123 on node7\); wait"):
                lock.claim()
            assert clock.now - 1000 == run_lock.LEASE
        assert capsys.readouterr().err.count("locked by another host (process 123 on node7)") == 1


def test_a_partial_copy_of_a_checkpoint_does_not_stand_in_for_it(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    save(run, 1)
    assert steps(run) == [1]
    assert checkpoint.load(run.checkpoints()[0])["x"].item() == 1


def cut_short(value: Any, file: Any) -> None:
    """torch.save on a disk that is full."""
    file.write(b"half")
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4 vs 0")


def test_a_full_disk_where_the_model_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path)
    run.prepare()
    run.begin(0)
    save(run, 1)
    assert run.is_current(1) and not run.is_current(2)
    model = ({"x": torch.tensor(2.0)}, {"x": "model.y.z"}, {"step": 2, "epoch": 0})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_short)
        with pytest.raises(UserError, match=r"cannot write .*current.pth: No space left on device"):
            run.write_current(*model)
    assert run.is_current(1)
    run.write_current(*model)
    assert run.is_current(2)
    (tmp_path / "current.pth").write_bytes(b"damaged")
    assert not run.is_current(2)


def test_a_full_disk_after_the_checkpoint_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path)
    run.prepare()
    run.begin(0)
    save(run, 1)
    monkeypatch.setattr(torch, "save", cut_short)
    monkeypatch.setattr(run_folder.checkpoint, "save", lambda folder, *_: folder.mkdir())
    with pytest.raises(UserError, match="No space left on device; checkpoint step-00000002"):
        save(run, 2)
    monkeypatch.undo()
    assert torch.load(tmp_path / "current.pth", weights_only=True)["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "current.pth",
    ]


def test_what_is_being_written_is_not_yet_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, free = folder(tmp_path), threading.Event()
    run.prepare()
    assert run.last_good() == "none"
    save(run, 1)
    first, write = str(run.checkpoints()[0]), checkpoint.save
    assert run.last_good() == first
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: free.wait(60) and write(*a, **k))
    run.save(2, {"x": torch.tensor(2.0)}, {"x": "model.y.z"}, {"step": 2, "epoch": 0}, False)
    assert run.last_good() == f"{first}; step-00000002 is being written"
    free.set()
    run.finish_saving()
    assert run.last_good() == str(run.checkpoints()[1])


def waits_while(run: RunFolder, then: Callable[[], None], lease: float = 30.0) -> None:
    """Let a run, on a host of its own, wait by a clock that its waiting alone moves on."""
    clock = Clock(lease, then)
    run.lock = RunLock(run.lock.path, "node8", lambda: clock.now, clock.sleep)


@pytest.mark.parametrize("wish", ["auto", "none", "path"])
def test_what_is_resumed_from_is_chosen_after_the_wait(tmp_path: Path, wish: str) -> None:
    """While it waits the other run saves once more, drops the checkpoint before, and ends."""
    first = folder(tmp_path, keep_checkpoints=1)
    first.prepare()
    if wish != "none":
        save(first, 3)
    first.release()
    resume = str(tmp_path) if wish == "path" else wish
    run = folder(tmp_path, resume=resume)
    with locked_by(tmp_path / ".lock", "node7 123 0123456789abcdef\n") as other:

        def go_on_and_end() -> None:
            save(first, 5)
            other.kill()
            other.wait()

        waits_while(run, go_on_and_end)
        if wish == "none":
            assert "--resume none" in refusal(run)
        else:
            assert run.prepare() == tmp_path / "checkpoints" / "step-00000005"
    assert steps(run) == [5]


def test_a_run_elsewhere_that_does_not_end_may_be_gone_on_with_later(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with locked_by(tmp_path / ".lock", "node7 123 0123456789abcdef\n"):
        waits_while(run, lambda: None)
        with pytest.raises(StoppedEarly, match="start the same command once that has ended"):
            run.prepare()


def test_a_folder_that_was_removed_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "out"
    run = folder(out)
    run.prepare()
    run.begin(0)
    save(run, 1)
    shutil.rmtree(tmp_path / "runs")
    log = run.side_file("log.txt")
    log.add(b"on we go\n")
    save(run, 2)
    assert steps(run) == [2] and (out / "log.txt").read_text() == "on we go\n"
    assert json.loads((out / "config.json").read_text())["recipe"] == "cifar10"
    said = capsys.readouterr().err
    assert said.count("was removed during the run") == 1
    # It is locked as before (which reading the lock would end, in this process).
    lines = [
        "from pathlib import Path",
        "from moco_scale.distributed.run_lock import RunLock",
        f"RunLock(Path({str(out / '.lock')!r})).claim()",
    ]
    other = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert "is being written by another run" in other.stderr


@pytest.mark.parametrize("ended", [False, True])
def test_a_folder_that_another_run_has_taken_is_left_to_it(
    tmp_path: Path, ended: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = folder(out)
    run.prepare()
    shutil.rmtree(out)
    out.mkdir()
    with locked_by(out / ".lock", "node7 123 0123456789abcdef\n") as other:
        if ended:
            other.kill()
            other.wait()
        log = run.side_file("log.txt")
        log.add(b"of the first\n")
        with pytest.raises(UserError, match="was removed during the run, and is another run's now"):
            save(run, 1)
        assert [p.name for p in out.iterdir()] == [".lock"]
        assert (out / ".lock").read_text() == "node7 123 0123456789abcdef\n"
    assert "another run's now; training continues" in capsys.readouterr().err


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").symlink_to(tmp_path / "thesis")
    assert "cannot be written" in refusal(folder(out))
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_folder_that_cannot_be_made_again_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    run = folder(out)
    run.prepare()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=f"--output-dir {out} cannot be written: "):
        save(run, 1)


def fails(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("damage", [b"", b'{"step": 1}\n{"st\n'])
def test_a_full_disk_does_not_keep_a_run_from_going_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: bytes,
) -> None:
    """A rewrite needs room only where more than the end is dropped."""
    run = folder(tmp_path)
    run.prepare()
    run.begin(0)
    save(run, 1)
    run.metrics.write_bytes(damage + b'{"step": 1}\n{"step": 2}\n')
    run.release()
    again = folder(tmp_path, print_freq=3)
    again.prepare()
    monkeypatch.setattr(run_folder, "write_atomically", fails)
    monkeypatch.setattr(side_files, "write_atomically", fails)
    again.begin(1)
    said = capsys.readouterr().err
    assert "config.json: No space left on device; it stays as it was" in said
    assert ("cannot rewrite" in said) == bool(damage)
    assert damage or run.metrics.read_bytes() == b'{"step": 1}\n'
