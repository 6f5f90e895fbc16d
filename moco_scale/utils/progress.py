"""How far a long piece of work is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from moco_scale.utils.log import log
from moco_scale.utils.text import printable

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


def bar(label: str, unit: str, total: int | None = None, **options: Any) -> tqdm[Any]:
    """A bar on a terminal, nothing elsewhere.

    Args:
        label: foreign text is welcome.
        unit: what is counted.
        total: None: not known.
        options: of tqdm.
    """
    return tqdm(
        desc=printable(label, 60),
        total=total,
        unit=unit,
        disable=not sys.stderr.isatty(),
        leave=total is not None,
        **options,
    )


class Progress:
    """Context manager; `add` counts what is done. On stderr."""

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self._label, self._total, self._unit, self._count = label, total, unit, 0
        self._quiet_until = time.monotonic() + _LINE_SECONDS
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = bar(self._label, f" {self._unit}", self._total)
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
