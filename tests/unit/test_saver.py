"""What is written is what was there when saving began, one checkpoint at a time."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from moco_scale.checkpoints.background import BackgroundSaver
from moco_scale.utils.errors import UserError


class Disk:
    """Somewhere to write, which can be held up and can fail."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.written: list[float] = []
        self.failure: Exception | None = None

    def write(self, tensors: dict[str, Tensor], group: Any) -> None:
        assert self.free.wait(60)
        if self.failure is not None:
            raise self.failure
        self.written.append(float(tensors["x"]))


def test_training_goes_on_and_does_not_change_what_is_written() -> None:
    saver, disk, x = BackgroundSaver(True), Disk(), torch.tensor(1.0)
    disk.free.clear()
    saver.start({"x": x}, disk.write)
    x += 1
    assert disk.written == []
    disk.free.set()
    saver.start({"x": x}, disk.write)
    x += 1
    saver.wait()
    assert disk.written == [1.0, 2.0]


def test_without_a_thread_it_is_written_at_once() -> None:
    saver, disk = BackgroundSaver(False), Disk()
    saver.start({"x": torch.tensor(1.0)}, disk.write)
    assert disk.written == [1.0]
    disk.failure = UserError("the disk is full")
    with pytest.raises(UserError, match="the disk is full"):
        saver.start({"x": torch.tensor(2.0)}, disk.write)


@pytest.mark.parametrize("later", ["wait", "start"])
def test_a_failure_is_raised_at_the_next_occasion_and_once(later: str) -> None:
    saver, disk = BackgroundSaver(True), Disk()
    disk.failure = UserError("the disk is full")
    saver.start({"x": torch.tensor(1.0)}, disk.write)
    with pytest.raises(UserError, match="the disk is full"):
        saver.wait() if later == "wait" else saver.start({"x": torch.tensor(2.0)}, disk.write)
    disk.failure = None
    saver.start({"x": torch.tensor(3.0)}, disk.write)
    saver.wait()
    assert disk.written == [3.0]


def test_a_failure_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    saver, disk = BackgroundSaver(True), Disk()
    disk.free.clear()
    disk.failure = UserError("the disk is full")
    saver.start({"x": torch.tensor(1.0)}, disk.write)
    assert not saver.failed
    disk.free.set()
    assert saver._thread is not None
    saver._thread.join()  # nobody asks for the outcome
    assert saver.failed
    assert "saving has failed, so the run will stop: the disk is full" in (capsys.readouterr().err)
    with pytest.raises(UserError, match="the disk is full"):
        saver.wait()
    assert not saver.failed


def test_what_nobody_expected_is_raised_too() -> None:
    saver, disk = BackgroundSaver(True), Disk()
    disk.failure = ZeroDivisionError("what")
    saver.start({"x": torch.tensor(1.0)}, disk.write)
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_shapes_may_change() -> None:
    saver, sizes = BackgroundSaver(True), []
    for size in (3, 5, 2):
        saver.start({"x": torch.zeros(size)}, lambda copies, _: sizes.append(len(copies["x"])))
    saver.wait()
    assert sizes == [3, 5, 2]
