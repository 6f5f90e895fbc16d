"""The list of pictures that cannot be decoded: whole lines of it, whatever names and lines hold."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from foreign_sets import picture, write_tar

from moco_scale.bad_pictures import FILE, BadPictures
from moco_scale.data.bad_samples import BadSample, bad_sample
from moco_scale.data.open_shards import open_shards
from moco_scale.untrusted.limits import LIST_LINE

HOSTILE = "x\x1b[2J\n2026 all is well\u2028\x85caf\udce9"
SHOWN = r"x\x1b[2J\n2026 all is well\u2028\x85caf\xe9"


def bad_pictures(folder: Path) -> BadPictures:
    return BadPictures(folder, "look", 4, 1000, 0.5)


def met(step: int, *bad: BadSample) -> Any:
    return cast(Any, SimpleNamespace(step=step - 1, epoch=0, bad=bad))


def lines(folder: Path) -> list[dict[str, Any]]:
    content = (folder / FILE).read_bytes().decode("utf-8")
    return [json.loads(line) for line in content.removesuffix("\n").split("\n")]


def test_names_that_no_terminal_should_see_are_listed_as_escapes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", picture(1)), (f"{HOSTILE}.jpg", b"none")])
    shards = open_shards(tmp_path / "0.tar", "train")
    assert shards.where(1) == f"0.tar at byte {shards.place(1).offset} (key {SHOWN})"
    found = bad_pictures(tmp_path)
    found.note(met(3, bad_sample(shards, 1, f"no picture: {HOSTILE}", 0)))
    said = found.collect(3)
    assert f"(key {SHOWN}): no picture: {SHOWN}; sample 0" in said[0]
    assert all(line.isprintable() for line in said)
    (entry,) = lines(tmp_path)
    assert (entry["sample"], entry["key"], entry["step"]) == (1, SHOWN, 3)
    again = bad_pictures(tmp_path)
    again.begin(3)
    again.note(met(4, bad_sample(shards, 1, "no picture", 0)))
    assert again.collect(4) == [] and lines(tmp_path) == [entry]


def entry(sample: int, step: int, **more: Any) -> bytes:
    of = {"sample": sample, "shard": "0.tar", "key": "k", "reason": "r", "replacement": 0}
    return json.dumps({**of, "step": step, "epoch": 0, **more}, ensure_ascii=False).encode() + b"\n"


def test_a_list_is_taken_up_by_its_line_feeds(tmp_path: Path) -> None:
    """As earlier versions wrote it, with separators of lines in names."""
    whole = entry(1, 2, key="a\u2028b\x85c") + entry(5, 3, shard="t\u2029.tar")
    (tmp_path / FILE).write_bytes(whole + entry(7, 9) + b'{"sample": 8, "sha')
    found = bad_pictures(tmp_path)
    found.begin(4)
    assert (tmp_path / FILE).read_bytes() == whole
    found.note(met(5, *(BadSample(n, "0.tar", "", "r", 0) for n in (1, 5, 7))))
    assert len(found.collect(5)) == 2
    assert [line["sample"] for line in lines(tmp_path)] == [1, 5, 7]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 10_000,
        b'{"sample": "1", "shard": "0.tar", "step": 1}',
        b'{"sample": 1, "shard": "0.tar", "step": Infinity}',
        b'{"sample": -1, "shard": "0.tar", "step": 1}',
        b'{"sample": 1e400, "shard": 5, "step": 1}',
        b'{"sample": 1' + b"0" * 30 + b', "shard": "0.tar", "step": 1}',
        b"caf\xe9",
        b"\0" * 4096,
        b"{}",
    ],
)
def test_lines_that_are_no_entries_leave_the_list_and_are_said(
    tmp_path: Path, line: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_bytes(entry(1, 1) + line + b"\n" + entry(2, 1))
    bad_pictures(tmp_path).begin(4)
    assert (tmp_path / FILE).read_bytes() == entry(1, 1) + entry(2, 1)
    assert "1 lines are no entries" in capfd.readouterr().err


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(entry(1, 1) + b"x" * (3 * LIST_LINE))
    bad_pictures(tmp_path).begin(4)
    assert (tmp_path / FILE).read_bytes() == entry(1, 1)
