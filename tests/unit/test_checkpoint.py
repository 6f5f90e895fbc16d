"""The portable checkpoint: exact, whole or not there, and harmless to read."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moco_scale.checkpoints import checkpoint
from moco_scale.utils.errors import UserError


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 1 / 3])
    return {
        "model.query.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "model.channels_last": torch.randn(2, 3, 4, 4, generator=generator).contiguous(
            memory_format=torch.channels_last
        ),
        "model.view": torch.randn(6, 4, generator=generator)[::2, 1:3],
        "model.odd": odd,
        "model.half": torch.randn(5, generator=generator).bfloat16(),
        "meters.sums": torch.randn(2, 5, generator=generator, dtype=torch.float64),
        "queue.keys": torch.randn(7, 3, generator=generator),
        "queue.pointer": torch.tensor(3),
        "model.num_batches_tracked": torch.tensor(2**40 + 1),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        a.dtype == e.dtype and a.shape == e.shape and bits(a) == bits(e)
        for a, e in ((actual[name], expected[name]) for name in expected)
    )


def write(folder: Path, seed: int = 0) -> Path:
    checkpoint.save(folder, some_tensors(seed), {"step": seed, "config": {"dim": 3}})
    return folder


def is_good(folder: Path, seed: int) -> bool:
    return checkpoint.read_meta(folder)["step"] == seed and same(
        checkpoint.load(folder), some_tensors(seed)
    )


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "step-1", 1)
    assert is_good(folder, 1)
    assert checkpoint.read_meta(folder)["config"] == {"dim": 3}
    assert [p.name for p in folder.parent.iterdir()] == ["step-1"]


def test_a_checkpoint_may_be_moved(tmp_path: Path) -> None:
    moved = write(tmp_path / "here", 1).rename(tmp_path / "there")
    assert is_good(moved, 1)


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("*.distcp")
    return path


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    data = data_file(folder)
    size = data.stat().st_size
    os.truncate(data, size - 10)
    message = error_of(lambda: checkpoint.read_meta(folder))
    assert f"{folder} is damaged: {data.name} has {size - 10} bytes, {size} expected" in message
    # The reader by itself does not take it for whole either.
    assert str(folder) in error_of(lambda: checkpoint.load(folder))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "c")
    (folder / name).unlink()
    assert f"is damaged: {name} is missing" in error_of(lambda: checkpoint.read_meta(folder))
    assert str(folder) in error_of(lambda: checkpoint.load(folder))


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_a_truncated_index_is_no_checkpoint(tmp_path: Path, kept: int) -> None:
    folder = write(tmp_path / "c")
    os.truncate(folder / ".metadata", kept)
    assert "damaged" in error_of(lambda: checkpoint.read_meta(folder))
    assert "cannot be read" in error_of(lambda: checkpoint.load(folder))


def test_a_folder_that_is_none_of_ours(tmp_path: Path) -> None:
    assert "no such folder" in error_of(lambda: checkpoint.read_meta(tmp_path / "nowhere"))
    assert "has no meta.json" in error_of(lambda: checkpoint.read_meta(tmp_path))
    meta = tmp_path / "meta.json"
    for text in ("{", "[]", "3", "{}", '{"format": 99}', '{"format": "1"}'):
        meta.write_text(text)
        assert str(tmp_path) in error_of(lambda: checkpoint.read_meta(tmp_path))
    meta.write_text('{"format": 99}')
    assert "format 1, which this version reads" in error_of(lambda: checkpoint.read_meta(tmp_path))


def rewrite(folder: Path, **values: Any) -> None:
    """Change plain values of a checkpoint, as of an earlier version; None takes one away."""
    meta = json.loads((folder / "meta.json").read_text()) | values | {"own_crc32": None}
    kept = {name: value for name, value in meta.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("step", [None, "7", -1, 1.5, True, [7]]),
        ("files", [None, [], ["__0_0.distcp"], {".metadata": "5"}, {"../x": 5}, 3]),
        ("crc32", [None, [], {".metadata": None}, {".metadata": 1.5}, "x"]),
        ("config", [[], "x", 3]),
        ("keep", ["yes", 1]),
        ("unlogged", [[], {"record": {}}, {"record": [], "line": "x"}]),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path: Path, name: str, values: list[Any]) -> None:
    folder = write(tmp_path / "c")
    checkpoint.verify(folder)
    for value in values:
        rewrite(folder, **{name: value})
        for action in (checkpoint.read_meta, checkpoint.verify):
            message = error_of(lambda action=action: action(folder))  # type: ignore[misc]
            assert message.startswith(
                f"checkpoint {folder} is damaged, or not of moco_scale: its meta.json has no "
                f"usable value: {name}"
            )
        assert name not in checkpoint.readable_meta(folder)
        assert checkpoint.readable_meta(folder)["format"] == 1


def test_every_file_must_be_listed_with_its_checksum(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    whole = json.loads((folder / "meta.json").read_text())
    for name in (".metadata", "__0_0.distcp"):
        rest = {n: s for n, s in whole["crc32"].items() if n != name}
        rewrite(folder, crc32=rest)
        assert "no usable crc32 of each of its files" in error_of(lambda: checkpoint.verify(folder))
        rewrite(folder, crc32=rest, files={n: whole["files"][n] for n in rest})
        checkpoint.read_meta(folder)
        assert f"meta.json does not list {name}" in error_of(lambda: checkpoint.verify(folder))
        rewrite(folder, **whole | {"own_crc32": None})
    checkpoint.verify(folder)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def evil_pickle(how: str, trace: Path) -> bytes:
    if how == "a function":
        return pickle.dumps(Evil(trace))
    if how == "a method of a class that is let in":
        # pathlib's Path may be named; what hangs on it may not.
        text = pickle.dumps(str(trace), protocol=4)[2:-1]
        name = b"\x8c\x0aPath.mkdir"
        return b"\x80\x04\x8c\x07pathlib" + name + b"\x93" + text + b"\x85R."
    metadata = dcp.metadata.Metadata(state_dict_metadata={})
    metadata.planner_data = Evil(trace)
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    "how", ["a function", "a method of a class that is let in", "something inside a true index"]
)
def test_a_malicious_index_runs_nothing(tmp_path: Path, how: str) -> None:
    trace = tmp_path / "trace"
    content = evil_pickle(how, trace)
    folder = write(tmp_path / "c")
    (folder / ".metadata").write_bytes(content)
    assert "nothing was run" in error_of(lambda: checkpoint.load(folder))
    assert not trace.exists()


def test_the_malicious_index_would_have_run_something(tmp_path: Path) -> None:
    pickle.loads(evil_pickle("a function", tmp_path / "trace"))
    assert (tmp_path / "trace").exists()


def test_malicious_tensors_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = tmp_path / "c"
    checkpoint.save(folder, {"x": torch.ones(3)}, {})
    stream = io.BytesIO()
    torch.save(Evil(trace), stream)
    data_file(folder).write_bytes(stream.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "cannot be read" in error_of(lambda: checkpoint.load(folder))
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_malicious_object_beside_the_tensors_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = tmp_path / "c"
    writer = dcp.FileSystemWriter(folder)
    dcp.save({"x": torch.ones(3), "y": Evil(trace)}, storage_writer=writer, no_dist=True)
    trace.rmdir() if trace.exists() else None
    assert "cannot be read" in error_of(lambda: checkpoint.load(folder))
    assert not trace.exists()


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_full_disk_leaves_the_last_good_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path / "step-1", 1)

    def fill_the_disk(self: Any, plan: Any, planner: Any) -> Any:
        with open(Path(self.path) / "__0_0.distcp", "wb") as file:
            file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fill_the_disk)
    message = error_of(lambda: write(tmp_path / "step-2", 2))
    assert "No space left on device" in message
    assert "earlier checkpoints are untouched" in message
    assert str(tmp_path) in message
    monkeypatch.undo()
    assert left_in(tmp_path) == ["step-1"]
    assert is_good(good, 1)
    assert is_good(write(tmp_path / "step-2", 2), 2)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A real file system of one MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and `mount`")
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_a_truly_full_disk(small_disk: Path) -> None:
    large = {"x": torch.zeros(150_000)}  # 600 kB: there is room for one, not for two
    checkpoint.save(small_disk / "step-1", large, {"step": 1})
    for _ in range(2):
        message = error_of(lambda: checkpoint.save(small_disk / "step-2", large, {"step": 2}))
        assert "No space left on device" in message
        assert left_in(small_disk) == ["step-1"]
    assert same(checkpoint.load(small_disk / "step-1"), large)
    # Room for the tensors, but not for anything after them.
    rest = small_disk / "rest"
    with pytest.raises(OSError, match="No space"), open(rest, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    message = error_of(lambda: checkpoint.save(small_disk / "step-3", {}, {}))
    assert "No space left on device" in message
    assert left_in(small_disk) == ["rest", "step-1"]


CALLS = ("fsync", "rename")


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, failure: Callable[[], None]) -> list[int]:
    """Make the ``number``-th durable operation fail; the list counts them."""
    count = [0]
    for name in CALLS:
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, **keywords: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                failure()
            return real(*args, **keywords)

        monkeypatch.setattr(os, name, call)
    return count


def disk_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_error_at_any_point_leaves_nothing_half_done(tmp_path: Path) -> None:
    write(tmp_path / "step-1", 1)
    for number in range(1, 20):
        with pytest.MonkeyPatch.context() as patch:
            count = fail_at(patch, number, disk_error)
            try:
                write(tmp_path / "step-2", 2)
            except UserError as error:
                assert "Input/output error" in str(error)
        assert not list(tmp_path.glob(".*"))
        if (tmp_path / "step-2").exists():
            assert is_good(tmp_path / "step-2", 2)
            shutil.rmtree(tmp_path / "step-2")
        if count[0] < number:
            break
    assert number > len(CALLS)  # several places were tried, and the last try met no error
    assert is_good(tmp_path / "step-1", 1)


def save_and_die(folder: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        write(folder, 2)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kill_9_at_any_point_leaves_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    target = tmp_path / "step-2"
    deaths = 0
    for number in range(1, 20):
        process = fork.Process(target=save_and_die, args=(target, number))
        process.start()
        process.join()
        # Under its final name it is whole, whatever else lies about.
        if target.exists():
            assert is_good(target, 2)
            shutil.rmtree(target)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        # The next attempt sweeps up what this one left.
        assert is_good(write(target, 2), 2)
        assert left_in(tmp_path) == ["step-2"]
        shutil.rmtree(target)
    assert deaths > len(CALLS)


def test_the_description_is_plain_json(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", 4)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["format"] == 1
    assert meta["files"] == {
        p.name: p.stat().st_size for p in folder.iterdir() if p.name != "meta.json"
    }
