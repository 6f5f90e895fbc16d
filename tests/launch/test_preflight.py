"""One rank that is not like the others: training refuses to start and names it."""

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from commands import TINY, forked, make_shards
from conftest import write_picture

from moco_scale import command_line, identity


def other_flags(*flags: str) -> None:
    """Rank 1 is started with further flags."""
    if os.environ["RANK"] == "1":
        parse = command_line.parse
        mock.patch.object(command_line, "parse", lambda: parse([*sys.argv[1:], *flags])).start()


def other_code(package: str) -> None:
    """Rank 1's package lies elsewhere."""
    if os.environ["RANK"] == "1":
        identity.PACKAGE = Path(package)


def other_library(name: str, version: str) -> None:
    """Rank 1 has another version of a library."""
    if os.environ["RANK"] == "1":
        installed = importlib.metadata.version
        answer = mock.Mock(side_effect=lambda n: version if n == name else installed(n))
        mock.patch.object(importlib.metadata, "version", answer).start()


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    package = shutil.copytree(identity.PACKAGE, tmp_path / "edited")
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
    assert output.count("train.py: error: the processes are not alike") == 1
    assert not out.exists()
    return output


def test_another_seed(tiny_shards: Path, tmp_path: Path) -> None:
    output = refused(tiny_shards, tmp_path / "out", other_flags, "--rng-seed", "7")
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
        write_picture(tmp_path / "pictures" / f"{i}.jpg", seed=i)
    other = make_shards(tmp_path / "pictures", tmp_path / "shards")
    output = refused(tiny_shards, tmp_path / "out", other_flags, "--data-dir", str(other))
    assert re.search(r"index of --data-dir: \w+ on rank 1 .*, \w+ on rank 0", output), output
    assert "the same pictures and the same index" in output
