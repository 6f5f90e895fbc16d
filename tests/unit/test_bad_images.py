"""The list of images that cannot be decoded: whole lines of it, whatever names, lines, disks."""

import errno
import json
import os
import types
from pathlib import Path
from typing import Any, cast

import pytest
from foreign_sets import image, write_tar

from moco_scale.data.loading.bad_samples import BadSample, bad_sample
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.data.open import open_shards
from moco_scale.observe import side_files
from moco_scale.observe.side_files import SideFile
from moco_scale.training.bad_images import FILE, BadImages
from moco_scale.untrusted.limits import LINE
from moco_scale.utils.text import printable

NAMES = [
    printable(name, 4096)  # as `bad_sample` gives them
    for name in ("caf\udce9.jpg", "a\u2028b", "a\x85b", "a\x1b[2Jb\n", "日本.jpg", "x" * 5000)
]


def meet(bad: BadImages, step: int, *names: str) -> list[str]:
    """Let a run meet images of these names in a step."""
    met = [BadSample(100 * step + i, name, name, "is no image", 0) for i, name in enumerate(names)]
    batch = types.SimpleNamespace(step=step - 1, epoch=0, bad=met)
    bad.add(cast(ViewBatch, batch))
    return bad.collect(step)


def begun(folder: Path, step: int) -> BadImages:
    bad = BadImages(folder, "advice", 100, 10_000, 1.0)
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
        assert "bad images so far: 2" in meet(bad, 6, "a")[-1]
    meet(bad, 7, "b")
    said = capsys.readouterr().err
    assert said.count("training continues") == 2 and "all is there" in said
    keys = [
        json.loads(line).get("key") for line in (tmp_path / FILE).read_bytes().split(b"\n")[2:4]
    ]
    assert keys == ["a", "b"]


HOSTILE = "x\x1b[2J\n2026 all is well\u2028\x85caf\udce9"
SHOWN = r"x\x1b[2J\n2026 all is well\u2028\x85caf\xe9"


def met(step: int, *bad: BadSample) -> Any:
    return cast(Any, types.SimpleNamespace(step=step - 1, epoch=0, bad=bad))


def lines(folder: Path) -> list[dict[str, Any]]:
    content = (folder / FILE).read_bytes().decode("utf-8")
    return [json.loads(line) for line in content.removesuffix("\n").split("\n")]


def test_names_that_no_terminal_should_see_are_listed_as_escapes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", image(1)), (f"{HOSTILE}.jpg", b"none")])
    shards = open_shards(tmp_path / "0.tar", "train")
    assert shards.where(1) == f"0.tar at byte {shards.place(1).offset} (key {SHOWN})"
    found = begun(tmp_path, 0)
    found.add(met(3, bad_sample(shards, 1, f"no image: {HOSTILE}", 0)))
    said = found.collect(3)
    assert f"(key {SHOWN}): no image: {SHOWN}; replaced by sample 0" in said[0]
    assert all(line.isprintable() for line in said)
    (entry,) = lines(tmp_path)
    assert (entry["sample"], entry["key"], entry["step"]) == (1, SHOWN, 3)
    again = begun(tmp_path, 3)
    again.add(met(4, bad_sample(shards, 1, "no image", 0)))
    assert again.collect(4) == [] and lines(tmp_path) == [entry]


def entry(sample: int, step: int, **more: Any) -> bytes:
    of = {"sample": sample, "shard": "0.tar", "key": "k", "reason": "r", "replacement": 0}
    return json.dumps({**of, "step": step, "epoch": 0, **more}, ensure_ascii=False).encode() + b"\n"


def test_a_list_is_taken_up_by_its_line_feeds(tmp_path: Path) -> None:
    """As earlier versions wrote it, with separators of lines in names."""
    whole = entry(1, 2, key="a\u2028b\x85c") + entry(5, 3, shard="t\u2029.tar")
    (tmp_path / FILE).write_bytes(whole + entry(7, 9) + b'{"sample": 8, "sha')
    found = begun(tmp_path, 4)
    assert (tmp_path / FILE).read_bytes() == whole
    found.add(met(5, *(BadSample(n, "0.tar", "", "r", 0) for n in (1, 5, 7))))
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
    begun(tmp_path, 4)
    assert (tmp_path / FILE).read_bytes() == entry(1, 1) + entry(2, 1)
    assert "dropped 1 lines that are no entries" in capfd.readouterr().err


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(entry(1, 1) + b"x" * (3 * LINE))
    begun(tmp_path, 4)
    assert (tmp_path / FILE).read_bytes() == entry(1, 1)
