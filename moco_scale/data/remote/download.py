"""Download of a file, with retries and checks."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moco_scale.data.remote.store import CHUNK, Body, FetchError, FileState, Store
from moco_scale.untrusted.limits import LEAST_RATE
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log
from moco_scale.utils.progress import progressed
from moco_scale.utils.text import printable

_WRONG_AT_MOST = 3  # a file that arrives whole and wrong so often is wrong over there
_SAID_AFTER = 10.0  # seconds of failures at a start that nobody has been told of
_LOOK = 60.0  # seconds in which a connection has to bring something worth its while
_jitter = random.SystemRandom()  # clients that failed together shall not come back together


class RemoteFile(NamedTuple):
    """Remote file, and what is known of it."""

    name: str
    bytes: int | None = None
    checksum: str | None = None
    """Hex BLAKE2b-128 of its bytes."""
    version: str = ""
    """Differs where what lies under this name does; "" where one index goes with one version.
    Found out here, never what a server says."""
    scan: str = ""
    """Path of the file's saved scan, if it was scanned here."""
    most: int | None = None
    """Bytes at which it is given up, where it is not known how many it has."""


class Sink(Protocol):
    """Destination of a download; it may hold the beginning of the file already."""

    def write(self, data: bytes, /) -> object: ...
    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...
    def truncate(self, size: int, /) -> int: ...


@dataclass(frozen=True)
class RetryPolicy:
    """Waits and limits of retries.

    Attributes:
        give_up: seconds without new bytes after which a file is given up. One that advances,
            however often its connection breaks, is not.
        first_wait: longest wait after the first failure, in seconds; doubled after each further
            one without new bytes. The wait itself is drawn between a half and the whole of it.
        longest_wait: limit of the doubling.
    """

    give_up: float = 600.0
    first_wait: float = 0.5
    longest_wait: float = 30.0


class Stopped(Exception):
    """The file is no longer wanted."""


class TooLarge(UserError):
    """A file of unknown size has more bytes than allowed."""


def never() -> bool:
    """Return False."""
    return False


def download(
    store: Store,
    file: RemoteFile,
    sink: Sink,
    retry: RetryPolicy,
    stopped: Callable[[], bool] = never,
    held: int = 0,
) -> None:
    """Download a file to `sink`, which holds its first `held` bytes already.

    After a broken connection it continues where it was, if the store can.

    Raises:
        TooLarge: It has more than `file.most` bytes.
        UserError: It is missing, or stays broken; the message counts the failures.
        Stopped: `stopped` became true.
        OSError: The sink cannot be written.
    """
    transfer = _Transfer(store, file, sink, stopped)
    if held:
        transfer.resume(held)
    attempts = _Attempts(store, file, retry, held)
    while True:
        try:
            transfer.attempt()
            return
        except FetchError as error:
            hopeless = transfer.wrong >= _WRONG_AT_MOST
            wait = attempts.failed(error, transfer.furthest, hopeless)
        _sleep(wait, stopped)


def download_document(
    store: Store, file: RemoteFile, sink: Sink, retry: RetryPolicy, seconds: float
) -> None:
    """Download a small file, which has to arrive in so many seconds over a connection.

    Unlike a shard it is given up when it is too slow. Raises the errors of `download`.
    """
    transfer = _Transfer(store, file, sink, never, seconds)
    attempts = _Attempts(store, file, retry, says=True)
    while True:
        try:
            transfer.attempt()
            return
        except FetchError as error:
            wait = attempts.failed(error, 0, transfer.wrong >= _WRONG_AT_MOST)
        _sleep(wait, never)


def state_of(store: Store, file: RemoteFile, retry: RetryPolicy) -> FileState:
    """Ask a store for a file's state. Raises UserError as `download` does."""
    attempts = _Attempts(store, file, retry, says=True)
    while True:
        try:
            return store.state(file.name)
        except FetchError as error:
            wait = attempts.failed(error)
        _sleep(wait, never)


class _Attempts:
    """Count of failures, and the decision to try again.

    Args:
        store: of the file.
        file: to download.
        retry: waits and limits.
        says: log failures on the way, once. For downloads that a start waits for; readers would all
            log at once.
    """

    def __init__(
        self,
        store: Store,
        file: RemoteFile,
        retry: RetryPolicy,
        held: int = 0,
        says: bool = False,
    ) -> None:
        self._says = says
        self._store, self._file, self._retry = store, file, retry
        self._failures: Counter[str] = Counter()
        self._started = self._advanced = time.monotonic()
        self._furthest, self._idle = held, 0

    def failed(self, error: FetchError, furthest: int = 0, hopeless: bool = False) -> float:
        """Return seconds to wait before the next attempt.

        Args:
            error: of this attempt.
            furthest: largest number of bytes so far.
            hopeless: give up now.

        Raises:
            UserError: There is no next attempt.
        """
        now, retry = time.monotonic(), self._retry
        self._failures[str(error)] += 1
        # A byte now and then is no advance.
        if furthest > self._furthest + LEAST_RATE * max(0.0, now - self._advanced - _LOOK):
            self._furthest, self._advanced, self._idle = furthest, now, 0
        wait = min(retry.longest_wait, retry.first_wait * 2**self._idle)
        wait = max(error.wait, wait * _jitter.uniform(0.5, 1.0))
        self._idle += 1
        late = now + wait - self._advanced > retry.give_up
        if hopeless or late or not error.passing:
            seconds = now - self._started
            raise UserError(
                _gave_up(self._store, self._file, self._failures, str(error), seconds)
            ) from None
        address = self._store.address(self._file.name)
        log.debug(f"{address}: {error}; tried again in {wait:.1f} s")
        if self._says and now - self._advanced >= _SAID_AFTER:
            self._says = False
            log.warning(
                f"{address}: {error}; it is tried for {retry.give_up:.0f} s (--shard-timeout)"
            )
        return wait


class _Transfer:
    """Download of one file over any number of connections.

    Attributes:
        furthest: largest number of bytes so far.
        wrong: how often it arrived whole with wrong bytes.
    """

    def __init__(
        self,
        store: Store,
        file: RemoteFile,
        sink: Sink,
        stopped: Callable[[], bool],
        seconds: float = float("inf"),
    ) -> None:
        """seconds: for all of the file over one connection."""
        self._store, self._file, self._sink, self._stopped = store, file, sink, stopped
        self._seconds = seconds
        self._offset, self._hash = 0, hashlib.blake2b(digest_size=16)
        self.furthest, self.wrong = 0, 0

    def resume(self, held: int) -> None:
        self._sink.seek(0)
        while self._offset < held:
            chunk = self._sink.read(min(CHUNK, held - self._offset))
            if not chunk:
                break
            self._hash.update(chunk)
            self._offset += len(chunk)
        self.furthest = self._offset

    def _restart(self) -> None:
        self._sink.seek(0)
        self._sink.truncate(0)
        self._offset, self._hash = 0, hashlib.blake2b(digest_size=16)

    def attempt(self) -> None:
        """Download over one connection. Raises FetchError, Stopped, OSError of the sink."""
        wanted = self._file.bytes
        if wanted is None or self._offset < wanted:
            with self._store.open(self._file.name, self._offset) as body:
                self._receive(body)
        self._check()

    def _receive(self, body: Body) -> None:
        wanted = self._file.bytes
        if body.start != self._offset:
            self._restart()
        if body.total is not None and wanted is not None and body.total != wanted:
            self._restart()
            self.wrong += 1
            raise FetchError(f"it has {body.total} bytes there, its index says {wanted}")
        pace = _Pace(self._seconds)
        for chunk in body.chunks():
            if self._stopped():
                raise Stopped
            pace.check(len(chunk))
            if self._file.most is not None and self._offset + len(chunk) > self._file.most:
                self._restart()
                raise TooLarge(_too_large(self._store, self._file))
            self._sink.write(chunk)
            self._hash.update(chunk)
            self._offset += len(chunk)
            if wanted is not None and self._offset > wanted:
                self._restart()
                self.wrong += 1
                raise FetchError(f"more than the {wanted} bytes its index says arrived")
            self.furthest = max(self.furthest, self._offset)
            progressed()
        whole = wanted if wanted is not None else body.total
        if whole is not None and self._offset < whole:
            raise FetchError("the connection ended early")

    def _check(self) -> None:
        if self._file.checksum is not None and self._hash.hexdigest() != self._file.checksum:
            self._restart()
            self.wrong += 1
            raise FetchError("all of it arrived, but its checksum is wrong")


class _Pace:
    """Pace of a connection, to drop one that is not silent but too slow."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._started = seconds, time.monotonic()
        self._looked, self._bytes = self._started, 0

    def check(self, size: int) -> None:
        """Check the pace after so many bytes. Raises FetchError: too slow."""
        now = time.monotonic()
        self._bytes += size
        if now - self._started > self._seconds:
            raise FetchError(f"it has not arrived within {self._seconds:.0f} s")
        if now - self._looked > _LOOK:
            if self._bytes < LEAST_RATE * (now - self._looked):
                raise FetchError(f"{self._bytes} bytes in {now - self._looked:.0f} s")
            self._looked, self._bytes = now, 0


def _too_large(store: Store, file: RemoteFile) -> str:
    return (
        f"{store.address(file.name)} does not end: more than {file.most:,} bytes have arrived, "
        "which are as many as are taken"
    )


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise Stopped
        time.sleep(min(0.1, left))


def _gave_up(
    store: Store, file: RemoteFile, failures: Counter[str], last: str, seconds: float
) -> str:
    count = sum(failures.values())
    where = f"{printable(file.name)} could not be fetched from {store.address(file.name)}"
    if count == 1:
        return f"{where}: {last}. {_advice(last, file)}"
    each = ", ".join(f"{number} x {reason}" for reason, number in failures.most_common(5))
    tried = f"given up after {count} attempts in {seconds:.0f} s ({each})"
    return f"{where}: {tried}. {_advice(last, file)}"


def _advice(reason: str, file: RemoteFile) -> str:
    if "checksum" in reason or "index says" in reason:
        if file.scan:
            return (
                "It was replaced since it was indexed: start again in a minute, and it is indexed "
                f"again. Where the server does not tell the two apart, remove {file.scan} first"
            )
        return (
            "What lies there is not what was made: copy the shards there again, all of one making "
            "and with their index"
        )
    if "404" in reason or "NotFound" in reason:
        if file.scan:
            return "There is no such tar: check the address, and the range of numbers in its braces"
        return "Check the address; it names the folder that holds the shards and their index.json"
    if "401" in reason or "403" in reason or "Permission" in reason or "Credentials" in reason:
        return "Check the credentials, and that they allow reading there"
    return "Check the address and the network; start again to resume"
