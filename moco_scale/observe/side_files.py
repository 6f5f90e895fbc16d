"""Side files of a run, which it can do without: logs, metrics, curves, lists."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from moco_scale.untrusted.documents import lines_of
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import write_atomically
from moco_scale.utils.log import log

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
_WAITING = 4 << 20  # bytes that are kept until they can be written


def _nothing() -> None:
    return None


class SideFile:
    """File that a run appends to, whole entries at a time; if it fails, training continues.

    The failure is logged once. Entries that could not be written are kept, up to 4 MB, and written
    when the file is available again; a partly written entry is cut off before anything is appended.
    The file is opened for each entry: it may be removed, or its disk come back, meanwhile.

    Args:
        path: the file; its folder is made if only that one is missing.
        head: start of a new file.
        before: called before each attempt; its OSError or UserError counts as the file's.
        warn: logs a line.
    """

    def __init__(
        self,
        path: Path,
        head: bytes = b"",
        before: Callable[[], None] = _nothing,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self.path = path
        self._head, self._before, self._warn = head, before, warn
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._said: set[str] = set()
        # While all of an entry is not known to be written: which file, and what of it is whole.
        self._torn: tuple[tuple[int, int], int] | None = None

    def add(self, entry: bytes) -> None:
        """Write an entry, after those that are waiting, or keep it until that is possible."""
        self._waiting.append(entry)
        problem = self._try()
        if problem is None:
            if self._said:
                self._say_once(
                    "again", f"{self.path} can be written again; {self._losses() or 'all is there'}"
                )
            return
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > _WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._say_once(
            "failed",
            f"cannot write {self.path}: {problem}; training continues, and what belongs there is "
            "written once that is possible",
        )

    def close(self) -> None:
        """Write waiting entries, and log what is lost; nothing may be added afterwards."""
        if self._waiting and self._try() is not None:
            self._lost += len(self._waiting)
            self._waiting.clear()
        if self._lost:
            self._say_once("lost", f"{self.path}: {self._losses()}")

    def _losses(self) -> str:
        return f"{self._lost} entries that could not be written are lost" if self._lost else ""

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._warn(text)

    def _try(self) -> str | None:
        """Write waiting entries; return why that failed, or None."""
        try:
            self._before()
            with contextlib.suppress(FileExistsError):
                self.path.parent.mkdir()
            self._write(b"".join(self._waiting))
        except OSError as error:
            return error.strerror or str(error)
        except UserError as error:
            return str(error)
        self._waiting.clear()
        return None

    def _write(self, data: bytes) -> None:
        file = os.open(self.path, _FLAGS, 0o666)
        try:
            status = os.fstat(file)
            place, size = (status.st_dev, status.st_ino), status.st_size
            if self._torn is not None and self._torn[0] == place and self._torn[1] < size:
                size = self._torn[1]
                os.ftruncate(file, size)
            self._torn = place, size
            rest = memoryview(data if size else self._head + data)
            while rest:
                rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)  # which is where a network's file system says that it is full
        self._torn = None


def json_text(value: Any, indent: int | None = None) -> str:
    """Format JSON for people, without characters that move a cursor or end a line.

    Characters that do not print are escaped: control characters, U+2028, and the surrogates of
    names that are not UTF-8, which the reader gets back.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def json_line(value: Any) -> bytes:
    """Format an entry of a file of JSON lines."""
    return json_text(value).encode() + b"\n"


def keep_lines(path: Path, wanted: Callable[[bytes], bool]) -> int:
    """Drop all lines of a file but wanted ones; return the number dropped.

    Lines dropped at the end, as those of steps that will run again, need no room.

    Raises:
        OSError: It cannot be read or written.
    """
    if not path.exists():
        return 0
    lines = list(lines_of(path))
    kept = [line for line in lines if wanted(line)]
    whole = [line if line.endswith(b"\n") else line + b"\n" for line in kept]
    if whole == lines[: len(whole)]:
        if len(whole) < len(lines):
            os.truncate(path, sum(map(len, whole)))
    else:
        write_atomically(path, b"".join(whole))
    return len(lines) - len(kept)


class Folder(Protocol):
    """Folder of a run's side files."""

    def side_file(
        self, name: str, warn: Callable[[str], None] = log.warning, head: bytes = b""
    ) -> SideFile:
        """Make a file of this name; the rest as in :class:`SideFile`."""
