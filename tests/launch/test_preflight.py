"""What is checked before training: one rank that is not like the others, folders, machines."""

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from commands import TINY, forked, make_shards
from conftest import write_image

from moco_scale.commands import preflight
from moco_scale.config.older_flags import HintingParser
from moco_scale.distributed import collectives, same_setup


def other_flags(*flags: str) -> None:
    """Rank 1 is started with further flags."""
    if os.environ["RANK"] == "1":
        parse = HintingParser.parse_known_args

        def with_more(parser: HintingParser, words: object) -> object:
            return parse(parser, [*sys.argv[1:], *flags])

        mock.patch.object(HintingParser, "parse_known_args", with_more).start()


def other_code(package: str) -> None:
    """Rank 1's package lies elsewhere."""
    if os.environ["RANK"] == "1":
        same_setup.PACKAGE = Path(package)


def other_library(name: str, version: str) -> None:
    """Rank 1 has another version of a library."""
    if os.environ["RANK"] == "1":
        installed = importlib.metadata.version
        answer = mock.Mock(side_effect=lambda n: version if n == name else installed(n))
        mock.patch.object(importlib.metadata, "version", answer).start()


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    package = shutil.copytree(same_setup.PACKAGE, tmp_path / "edited")
    (package / "schedules.py").write_text("# edited\n")
    return package


def refused(shards: Path, out: Path, prepare: Callable[..., None], *args: str) -> str:
    """What training of two ranks says, of which one was prepared to be different."""
    status, output = forked(
        *(*TINY, "--data-dir", shards, "--output-dir", out),
        ranks=2,
        prepare=prepare,
        prepare_args=args,
    )
    assert status == 2, output
    assert "Traceback" not in output
    assert output.count("train.py: error: ") == 1
    assert not (out / "config.json").exists()
    return output


def test_another_seed(tiny_shards: Path, tmp_path: Path) -> None:
    output = refused(tiny_shards, tmp_path / "out", other_flags, "--rng-seed", "7")
    assert "train.py: error: the processes differ:" in output
    assert re.search(r"--rng-seed: 7 on rank 1 \(\S+\), 0 on rank 0 \(\S+\)", output), output
    assert "with the same installation and the same flags" in output


def test_another_code_version(tiny_shards: Path, tmp_path: Path, edited: Path) -> None:
    output = refused(tiny_shards, tmp_path / "out", other_code, str(edited))
    assert re.search(r"code: moco_scale .* on rank 1 .*, moco_scale .* on rank 0", output), output
    assert "files of the package that differ: schedules.py" in output


def test_another_library_version(tiny_shards: Path, tmp_path: Path) -> None:
    output = refused(tiny_shards, tmp_path / "out", other_library, "numpy", "1.2.3")
    assert re.search(r"numpy: 1\.2\.3 on rank 1 \(\S+\), \d\S* on rank 0", output), output


def test_another_index(tiny_shards: Path, tmp_path: Path) -> None:
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.jpg", seed=i)
    other = make_shards(tmp_path / "images", tmp_path / "shards")
    output = refused(tiny_shards, tmp_path / "out", other_flags, "--data-dir", str(other))
    assert re.search(r"index of --data-dir: \w+ on rank 1 .*, \w+ on rank 0", output), output
    assert "the same images and the same index" in output


def test_another_output_folder(tiny_shards: Path, tmp_path: Path) -> None:
    """As where each host has a disk of its own under the same name."""
    other = tmp_path / "other"
    output = refused(tiny_shards, tmp_path / "out", other_flags, "--output-dir", str(other))
    assert re.search(
        r"rank 1 on \S+: --output-dir \S+ is another folder here than on rank 0", output
    )
    # Nor is it enough that something was written there once.
    other.mkdir()
    (other / ".lock").write_text("host 1 0123456789abcdef\n")
    output = refused(tiny_shards, tmp_path / "out", other_flags, "--output-dir", str(other))
    assert "a file system that all hosts share" in output


def alone_of_two(rank: int, port: int) -> None:
    """The other process never comes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    collectives.MEETING = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("rank", "taken", "said"),
    [
        (0, False, r"not all 2 processes came to 127\.0\.0\.1:\d+ .* 1/2 clients joined"),
        (1, False, r"cannot reach rank 0 at 127\.0\.0\.1:\d+ \(MASTER_ADDR, MASTER_PORT\)"),
        (0, True, r"127\.0\.0\.1:\d+ .* is taken: .* choose another MASTER_PORT"),
    ],
)
def test_processes_that_do_not_meet_say_why(
    tmp_path: Path, rank: int, taken: bool, said: str
) -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        port = holder.getsockname()[1]
        if taken:
            holder.listen()
        else:
            holder.close()
        status, output = forked(
            *(*TINY, "--output-dir", tmp_path),
            prepare=alone_of_two,
            prepare_args=(rank, port),
        )
    assert status == 2, output
    assert re.search(rf"train\.py: error: rank {rank} on \S+: {said}", output), output
    assert "Traceback" not in output


def test_preflight_looks_and_leaves(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    flags = (*TINY, "--data-dir", tiny_shards, "--preflight")
    status, output = forked(*flags, "--output-dir", out, ranks=2)
    assert status == 0, output
    assert not out.parent.exists()
    for line in (
        r"2 process\(es\) on 1 host\(s\), all with the same code, libraries, flags and index",
        r"code: moco_scale \S+, files [0-9a-f]{8}",
        r"libraries: python 3\.\S+, torch \d.*, pillow \d\S+",
        r"data: 32 images, index [0-9a-f]{32}, 4 steps an epoch of 8 images",
        rf"output: {out}, seen and writable by all, \d+\.\d GiB free",
        r"run: starts at step 0",
        r"environment of rank 0: .*OMP_NUM_THREADS=1.*",
        r"ranks +host +device +memory +cores +/dev/shm free +open files",
        r"0-1 +\S+ +CPU +\d+\.\d GiB +\d+ +\d+\.\d GiB +\d+",
        r"bandwidth per process +all processes \(2\)",
        r"all-reduce of 8 MiB +\d+\.\d\d GB/s",
        r"all-to-all of 8 MiB +\d+\.\d\d GB/s",
        r"all-reduce of one number +\d+\.\d\d ms",
        r"ready, after \d+\.\d s",
    ):
        assert len(re.findall(f"^{line}$", output, re.MULTILINE)) == 1, f"{line}\n{output}"


def test_preflight_of_a_run_that_is_there(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, "--max-steps", 1)
    assert status == 0, output
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    status, output = forked(*flags, "--preflight")
    assert status == 0, output
    assert f"run: goes on from {tmp_path}/checkpoints/step-00000001" in output
    assert "bandwidth" not in output  # of one process
    status, output = forked(*flags, "--preflight", "--nce-k", 64)
    assert status == 2
    assert "--nce-k: 32 in the run, 64 now" in output
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    assert after == before


def little_shared_memory(size: int) -> None:
    """Hosts have so many bytes of shared memory free."""
    look = preflight.look
    mock.patch.object(preflight, "look", lambda: look()._replace(shared_memory=size)).start()


def test_preflight_says_what_is_not_ready(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--num-workers", 2, "--preflight")
    batch = 2 * 4 * 3 * 16 * 16  # views, images of a rank, channels, pixels
    enough = 2 * 5 * batch  # ranks, batches
    for size, expected in ((enough, 0), (enough - 1, 2)):
        status, output = forked(
            *(*flags, "--output-dir", tmp_path / "out"),
            ranks=2,
            prepare=little_shared_memory,
            prepare_args=(size,),
        )
        assert status == expected, output
        assert ("ready, after" in output) == (status == 0)
        assert ("error: not ready:\n" in output) == (status == 2)
        assert ("/dev/shm has 0.0 GiB free, the workers of 2 process(es)" in output) == (
            status == 2
        )
