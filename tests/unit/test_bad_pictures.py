"""The list of pictures that cannot be decoded: any name, any disk."""

import errno
import json
import os
import types
from pathlib import Path
from typing import Any, cast

import pytest

from moco_scale import side_files
from moco_scale.bad_pictures import FILE, BadPictures
from moco_scale.data.bad_samples import BadSample
from moco_scale.data.reader import ViewBatch
from moco_scale.side_files import SideFile

NAMES = ["caf\udce9.jpg", "a\u2028b", "a\x85b", "a\x1b[2Jb\n", "日本.jpg", "x" * 5000]


def meet(bad: BadPictures, step: int, *names: str) -> list[str]:
    """Let a run meet pictures of these names in a step."""
    met = [
        BadSample(100 * step + i, name, name, "is no picture", 0) for i, name in enumerate(names)
    ]
    batch = types.SimpleNamespace(step=step - 1, epoch=0, bad=met)
    bad.note(cast(ViewBatch, batch))
    return bad.collect(step)


def begun(folder: Path, step: int) -> BadPictures:
    bad = BadPictures(folder, "advice", 100, 10_000, 1.0)
    bad.begin(step, SideFile(folder / FILE))
    return bad


def test_names_of_all_kinds_are_listed_and_known_again(tmp_path: Path) -> None:
    bad = begun(tmp_path, 0)
    meet(bad, 1, *NAMES)
    meet(bad, 2, *NAMES)
    content = (tmp_path / FILE).read_bytes()
    lines = content.decode("utf-8").split("\n")
    assert [json.loads(line)["key"] for line in lines[:-1]] == 2 * NAMES
    assert all(line.isprintable() for line in lines)
    again = begun(tmp_path, 2)
    assert meet(again, 1, *NAMES) == []  # known
    assert (tmp_path / FILE).read_bytes() == content
    # Of steps that run again the entries come anew, with the same steps.
    again = begun(tmp_path, 1)
    meet(again, 2, *NAMES)
    assert (tmp_path / FILE).read_bytes() == content


def fails(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_list_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_bytes(b"cut\n" + b'{"sample": 1, "shard": "s", "step": 1}\n')
    monkeypatch.setattr(side_files, "write_atomically", fails)
    bad = begun(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        assert "bad pictures so far: 2" in meet(bad, 6, "a")[-1]
    meet(bad, 7, "b")
    said = capsys.readouterr().err
    assert said.count("training goes on") == 2 and "all is there" in said
    keys = [
        json.loads(line).get("key") for line in (tmp_path / FILE).read_bytes().split(b"\n")[2:4]
    ]
    assert keys == ["a", "b"]
