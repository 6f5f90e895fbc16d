"""The log of a process, on standard error (:data:`log`), and its product (:func:`tell`).

Every message is written as a whole, and shows foreign text as :mod:`utils.text` does.
A terminal, pipe or disk that takes no more of it never ends a run.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
from typing import Any, TextIO

from moco_scale.utils.text import printable_lines

_LONGEST = 1 << 20  # characters of a message
_ALL = 1 << 40
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""What writing to a pipe without a reader, or to a terminal that is closed, answers for good."""
_PATIENCE_MS = 1000  # for a terminal that another program has made non-blocking


LEVELS = ("debug", "info", "warning", "error")
"""From the least important messages on; of an error, the run or command ends."""


class _StandardError(logging.Handler):
    """Writes a message at once and as a whole, so that lines of several processes do not mix.

    ``print``, and logging's own handlers, write the end of a line separately, and other processes
    come between.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = worded(record.levelno, record.getMessage())
        _write(sys.stderr, printable_lines(text, _LONGEST))


def worded(level: int, text: str) -> str:
    """Format a message for people; a warning is marked as one."""
    return f"warning: {text}" if level == logging.WARNING else text


log = logging.getLogger("moco_scale")
"""Where all of the package's messages go; those of libraries go their own ways."""
log.propagate = False
log.addHandler(_StandardError())
log.setLevel(logging.INFO)


def show_from(level: str) -> None:
    """Show messages of one of :data:`LEVELS` and of the following ones."""
    log.setLevel(level.upper())


def tell(text: object = "") -> None:
    """Write a line, or several, to standard output."""
    _write(sys.stdout, printable_lines(text, _ALL))


def _write(stream: TextIO | None, text: str) -> None:
    # ValueError: closed. In a program of ours neither comes: see outlive_terminal. RuntimeError: a
    # signal's handler has a message while this thread writes one.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if stream is not None:
            stream.write(text + "\n")
            stream.flush()


def outlive_terminal() -> None:
    """Let nothing that this process or its forks print fail from here on.

    Includes ``print``, loggers, warnings and progress bars of libraries. Descriptors 0 to 2 that
    are closed are opened, or files opened later would get the output. Call it once, before
    libraries keep a stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdout, sys.stderr = _lasting(1, sys.stdout), _lasting(2, sys.stderr)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc, assignment]
    logging.raiseExceptions = False


def unwritten() -> str | None:
    """Explain why standard output is incomplete; None: it is complete, or no longer wanted."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    lost = getattr(raw, "lost", None)
    return None if lost is None or lost == errno.EPIPE else os.strerror(lost)


def _lasting(number: int, before: TextIO | None) -> TextIO:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        before.flush()  # type: ignore[union-attr]
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(number)),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=number == 2,
    )


class _Lossy(io.RawIOBase):
    """Descriptor that accepts everything; what cannot be written is lost.

    Attributes:
        lost: number of the first error.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self.lost: int | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.write(self._number, view[done:])
            except BlockingIOError:
                if not _writable_soon(self._number):
                    break
            except OSError as error:
                self.lost = self.lost or error.errno
                if error.errno in _GONE:  # nor can libraries and child processes write there
                    with contextlib.suppress(OSError):
                        nothing = os.open(os.devnull, os.O_WRONLY)
                        os.dup2(nothing, self._number)
                        os.close(nothing)
                break
        return len(view)


def _writable_soon(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(_PATIENCE_MS))
