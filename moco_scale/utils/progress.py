"""Progress of long work: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from tqdm import tqdm

from moco_scale.utils.log import log
from moco_scale.utils.text import printable

T = TypeVar("T")
Bar: TypeAlias = "tqdm[Any]"

_LINE_SECONDS = 10.0
_listeners: list[Callable[[], None]] = []
_count = 0


@contextlib.contextmanager
def on_progress(listener: Callable[[], None]) -> Iterator[None]:
    """Call `listener` whenever long work in this process progresses, from any thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def progressed() -> None:
    """Record, from any thread, that long work progresses: this process's, or what it waits for."""
    global _count
    _count += 1
    for listener in tuple(_listeners):
        listener()


def progress_count() -> int:
    """Return how often long work has progressed; a change means that it does."""
    return _count


def bar(label: str, unit: str, total: int | None = None, **options: Any) -> Bar:
    """Make a bar on a terminal, nothing elsewhere.

    Args:
        label: foreign text is welcome.
        unit: what is counted.
        total: None: not known.
        options: of tqdm.
    """
    options.setdefault("leave", total is not None)
    return tqdm(
        desc=printable(label, 60),
        total=total,
        unit=unit,
        disable=not sys.stderr.isatty(),
        **options,
    )


class Progress:
    """Context manager; `add` counts what is done. On stderr.

    leave: the bar stays when all is done.
    """

    def __init__(self, label: str, total: int, unit: str = "images", leave: bool = True) -> None:
        self._label, self._total, self._unit, self._leave = label, total, unit, leave
        self._count = 0
        self._quiet_until = time.monotonic() + _LINE_SECONDS
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = bar(self._label, f" {self._unit}", self._total, leave=self._leave)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        self._count += count
        progressed()
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._quiet_until:
            line = f"{self._label}: {self._count} of {self._total} {self._unit}"
            log.info(line)
            self._quiet_until = time.monotonic() + _LINE_SECONDS


def progress(items: Iterable[T], label: str, total: int, unit: str) -> Iterator[T]:
    """Yield the same items, and show how many have been done with."""
    with Progress(label, total, unit, leave=False) as done:
        for item in items:
            yield item
            done.add(1)
