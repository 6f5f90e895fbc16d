"""Interface of a store of remote files.

A store is asked for a file by name, from some byte on, and gives its bytes or an error that tells
whether to try again. It neither retries nor checks: `download` does.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from moco_scale.data.remote.addresses import scrubbed
from moco_scale.untrusted.limits import SHARD_BYTES
from moco_scale.utils.text import printable

CHUNK = 1 << 20
_SAID = 120  # characters of what a server says that are shown
_TAG = 1000  # characters of a tag that are kept


class FetchError(Exception):
    """A file did not arrive.

    Attributes:
        passing: trying again can help.
        wait: seconds the server asks for before the next attempt; 0: it did not say.
    """

    def __init__(self, message: str, *, passing: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.passing, self.wait = passing, wait


class FileState(NamedTuple):
    """State of a file in a store, known without fetching it; None and "" where unknown."""

    bytes: int | None = None
    tag: str = ""
    """Tag of its content: an ETag, a generation."""
    changed: str = ""
    """Time of its last change."""

    @classmethod
    def said(cls, size: object, tag: object, changed: object) -> FileState:
        """Make a state from a server's untrusted answers."""
        known = isinstance(size, int) and 0 <= size <= SHARD_BYTES
        return cls(
            int(size) if known else None,  # type: ignore[call-overload]
            printable(tag or "", _TAG),
            printable(changed or "", _TAG),
        )

    def same(self, other: FileState) -> bool:
        """Tell whether the file is unchanged, as far as known.

        Servers that share the work may give tags, or times, of their own: one of the two is enough.
        """
        if self.bytes != other.bytes:
            return False
        pairs = [(self.tag, other.tag), (self.changed, other.changed)]
        known = [one == two for one, two in pairs if one and two]
        return any(known) or not known


class Body(ABC):
    """Bytes of a file from `start` on.

    Attributes:
        start: as asked for, or 0 where the store can only send all.
        total: size of the whole file; None when unknown.
    """

    start: int = 0
    total: int | None = None

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """Yield them up to the end or until the connection ends: a body may be short.

        Raises:
            FetchError: The connection failed.
        """


class Store(ABC):
    """Remote folder."""

    @abstractmethod
    def address(self, name: str) -> str:
        """Return a file's address for messages: without passwords and signatures."""

    @abstractmethod
    def open(self, name: str, start: int) -> contextlib.AbstractContextManager[Body]:
        """Open a file's bytes from `start` on. Raises FetchError."""

    def state(self, name: str) -> FileState:
        """Return a file's state without fetching it. Raises FetchError."""
        return FileState()


def said_by(error: object) -> str:
    """Shorten a server's or library's message to one line without passwords and signatures."""
    # Cut before it is searched for addresses, which takes time.
    return printable(scrubbed(printable(error, 4 * _SAID)), _SAID)
