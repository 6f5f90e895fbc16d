"""Signals received at once, whatever the main thread is doing; Ctrl-C before and after a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

HEARD_SECONDS = 3.0
"""For the main thread to notice Ctrl-C: in a library of C it never does."""
_NO_MORE = 0  # in the place of a signal's number


class Listening:
    """Handles signals in the main thread, and counts them in another.

    A handler in Python runs only when the main thread comes back to Python, which may wait for
    other ranks or a GPU for ever.

    Args:
        handlers: by signal; called in the main thread.
        told: called in a thread with the number of each signal that arrives.
    """

    def __init__(
        self,
        handlers: Mapping[int, Callable[[int, FrameType | None], Any]],
        told: Callable[[int], None],
    ) -> None:
        self._handlers, self._told = handlers, told
        self._before: dict[int, Any] = {}

    def start(self) -> None:
        """Start, in the main thread."""
        arrivals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        threading.Thread(target=self._count, args=(arrivals,), name="signals", daemon=True).start()
        # Written to by the C library's own handler, whatever the main thread is doing.
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number, handler in self._handlers.items():
            self._before[number] = signal.signal(number, handler)

    def stop(self) -> None:
        """Restore the former handlers, in the main thread."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._wakeup, bytes([_NO_MORE]))
        os.close(self._wakeup)

    def _count(self, arrivals: int) -> None:
        while True:
            for number in os.read(arrivals, 64):
                if number == _NO_MORE:
                    os.close(arrivals)
                    return
                if number in self._handlers:
                    self._told(number)


def is_ignored(number: int) -> bool:
    """Tell whether this process was started to ignore a signal, as by ``nohup``."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextlib.contextmanager
def interruptible(at_once: Callable[[], None]) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C within the block; the second one ends the process.

    So does the first where the main thread does not come back to Python.

    Args:
        at_once: ends this process, from any thread.
    """
    if is_ignored(signal.SIGINT) or threading.current_thread() is not threading.main_thread():
        yield
        return
    noticed = threading.Event()
    first: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noticed.set()
        raise KeyboardInterrupt

    def count(number: int) -> None:
        if not first:
            first.append(time.monotonic())
            if not noticed.wait(HEARD_SECONDS):
                at_once()
        elif time.monotonic() - first[0] > ONE_SIGNAL:
            at_once()

    listening = Listening({signal.SIGINT: interrupt}, count)
    listening.start()
    try:
        yield
    finally:
        listening.stop()


ONE_SIGNAL = 2.0
"""Seconds within which signals count as one: launchers pass on what the whole group got too."""
