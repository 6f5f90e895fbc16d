"""Results of several evaluations in one folder: none is lost, none is overwritten unseen."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from moco_scale.commands import evaluate
from moco_scale.evaluation import results
from moco_scale.utils.errors import UserError


def result(variant: str, top1: float = 50.0) -> dict[str, Any]:
    return {"variant": variant, "top1": top1, "settings": {"k": 3}}


def held(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def test_the_newest_of_each_kind_is_held(tmp_path: Path) -> None:
    for each in (result("knn"), result("linear", 60.0), result("knn", 51.0)):
        results.add(tmp_path, each)
    content = held(tmp_path)
    assert content["top1"] == 51.0
    assert content["all"] == {"knn": result("knn", 51.0), "linear": result("linear", 60.0)}


def add_when_all_are_there(folder: Path, number: int, barrier: Any) -> None:
    results.require_usable(folder)
    barrier.wait()
    for i in range(5):
        results.add(folder, result(f"{number}-{i}"))


def test_evaluations_beside_each_other_lose_nothing(tmp_path: Path) -> None:
    """Each saw an empty folder when it began."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=add_when_all_are_there, args=(tmp_path, number, barrier))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert set(held(tmp_path)["all"]) == {f"{n}-{i}" for n in range(4) for i in range(5)}
    assert not list(tmp_path.glob(".results.json.[!l]*"))


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    results.require_usable(tmp_path / "a" / "eval")
    shutil.rmtree(tmp_path / "a")
    results.add(tmp_path / "a" / "eval", result("knn"))
    assert set(held(tmp_path / "a" / "eval")["all"]) == {"knn"}


def test_a_result_that_cannot_be_kept_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    found = {**result("knn"), "top5": 60.0}
    with pytest.raises(UserError, match="cannot write"):
        evaluate._finish(tmp_path / "file", found)
    assert "knn: top-1 50.00 %, top-5 60.00 %" in capsys.readouterr().out


DAMAGED = [b"", b"[1]", b"{", b"\xff", b'{"top1": 3}', b'{"all": []}', b'{"all": {"a": 1}}']
DAMAGED += [b"[" * 100_000, b'{"all": {"a": {"top1": NaN}}}', b" " * (5 << 20)]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_what_is_damaged_is_named_at_the_start_and_kept_at_the_end(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}.* move it away, or choose another --output-dir"):
        results.require_usable(tmp_path)
    assert path.read_bytes() == content
    (tmp_path / "results.json.kept-1").write_text("kept before")
    results.add(tmp_path, result("knn"))
    assert held(tmp_path)["all"] == {"knn": result("knn")}
    assert (tmp_path / "results.json.kept-2").read_bytes() == content
    assert (tmp_path / "results.json.kept-1").read_text() == "kept before"
    assert "kept as results.json.kept-2" in capsys.readouterr().err
