"""Cache of fetched shards, bounded in size and shared by a user's processes on a machine.

``HOME/SET/shards/NAME`` is a whole and checked shard; ``.NAME.BYTES.partial`` beside it is one on
its way, for which BYTES are reserved. HOME is ``ROOT/moco_scale-shards-UID``: several users may
name one ROOT, in which each has his own folder; nothing else in ROOT is counted or removed. HOME
and each SET carry a marker; nothing without it is touched. Locks are of :mod:`utils.locks`, which
end with the process that holds them:

- a fetcher holds its partial file exclusively, so that two never fetch one shard;
- a reader holds the shard shared, for as long as it is mapped (a mapping keeps the file's
  descriptor, and with it the lock);
- eviction removes only shards that it can lock exclusively, the least recently used first;
- ``HOME/.lock`` is held while room is counted and made.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moco_scale.data.remote.download import RemoteFile, RetryPolicy, Stopped, download, never
from moco_scale.data.remote.store import Store
from moco_scale.utils import locks
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import write_atomically
from moco_scale.utils.log import log
from moco_scale.utils.own_folders import ForeignFolderError, make_own, opened, without_links
from moco_scale.utils.text import printable

SHARDS = "shards"
MARKER = ".moco_scale-shards"
_PARTIAL = re.compile(r"\..+\.(\d{1,18})\.partial", re.DOTALL)
_NONE_OF_OURS = (ForeignFolderError, FileNotFoundError, PermissionError)
_EARLIER = re.compile(r".+-[0-9a-f]{16}")  # sets of a cache as earlier versions laid it out
_LONGEST_NAME = 150
_POLL = 0.05  # seconds between looks at what another process does
GB = 10**9


def cache_home() -> Path:
    """Return the user's folder for what can be made again.

    In a folder shared by users, each but its owner has a sub-folder.
    """
    root = os.environ.get("MOCO_SCALE_CACHE")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(base) / "moco_scale"
    with contextlib.suppress(OSError):
        if os.stat(root).st_uid != os.geteuid():
            return Path(root) / f"user-{os.geteuid()}"
    return Path(root)


def gigabytes(size: int) -> str:
    """Format bytes in GB, as --shard-cache-size is; rounded up, to three digits."""
    step = 10 ** max(0, len(str(size)) - 3)
    return f"{-(-size // step) * step / GB:.9f}".rstrip("0").rstrip(".") + " GB"


def shard_path(folder: Path, file: RemoteFile) -> Path:
    """Return the path of a set's shard; its name may have folders in it."""
    quoted = urllib.parse.quote(file.name, safe="")
    if len(quoted) > _LONGEST_NAME:  # a file system has names of 255 bytes; a partial one has more
        digest = hashlib.blake2b(quoted.encode(), digest_size=16).hexdigest()
        quoted = f"{quoted[: _LONGEST_NAME - 33]}-{digest}"
    if file.version:
        quoted += "." + urllib.parse.quote(file.version, safe="")
    # A dot at the beginning is that of a partial file, or of the folder above.
    return folder / SHARDS / (f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted)


class NoRoom(Exception):
    """Everything in the cache is in use or wanted."""


@dataclass(frozen=True)
class ShardCache:
    """Cache of remote files in a folder of at most so many bytes.

    Args:
        root: the folder that the user names; made when needed.
        limit: bytes of this user's sub-folder.
        retry: of stores that fail, and for room that others use.
    """

    root: Path
    limit: int
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def home(self) -> Path:
        """Sub-folder of this user, with the sets."""
        return self.root / f"moco_scale-shards-{os.geteuid()}"

    def make(self, folder: Path) -> None:
        """Make the folder of a set in `home`.

        Raises:
            OSError: It cannot be made, or an existing one is not this program's and this user's.
        """
        if not self.root.is_dir():
            with contextlib.suppress(FileExistsError):  # a file, as the next line finds
                self.root.mkdir(parents=True, exist_ok=True)
        if make_own(self.home, MARKER):
            self._say_what_is_left()
        make_own(folder, MARKER)
        make_own(folder / SHARDS)

    def _say_what_is_left(self) -> None:
        """Log folders of versions without a marker, which mixed sets."""
        left = [found.parent for found in self.root.glob(f"*/{SHARDS}")]
        left = sorted(folder for folder in left if _EARLIER.fullmatch(folder.name))
        if left:
            log.warning(
                f"--shard-cache {self.root}: {len(left)} folder(s) there, such as {left[0]}, seem "
                "to be of an earlier version; they are neither used nor counted nor removed, so "
                "delete them if you do not need them"
            )

    def hold(
        self,
        store: Store,
        folder: Path,
        file: RemoteFile,
        *,
        stopped: Callable[[], bool] = never,
        let_go: Callable[[], None] = lambda: None,
    ) -> io.FileIO:
        """Open a shard, which is not removed until this file and its maps are closed.

        It is fetched unless it is there, or another process's fetch is waited for. While the cache
        is full of what others read, this waits. `let_go` is called first and should release all
        shards of this process.

        Raises:
            UserError: The shard cannot be fetched, the cache is too small, or the disk is full.
            Stopped: `stopped` became true.
        """
        deadline = time.monotonic() + self.retry.give_up
        with self.explained():
            self.make(folder)
        while True:
            held = self._open_whole(folder, file)
            if held is not None:
                return held
            try:
                self.fetch(store, folder, file, stopped=stopped)
            except NoRoom:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--shard-cache {self.root}: all {gigabytes(self.limit)} are in use, by "
                        "other runs perhaps; give this one a larger --shard-cache-size or a "
                        "--shard-cache of its own"
                    ) from None
                let_go()
                time.sleep(_POLL)

    def has(self, folder: Path, file: RemoteFile) -> bool:
        """Tell whether a shard is in the cache."""
        return shard_path(folder, file).exists()

    def fetch(
        self,
        store: Store,
        folder: Path,
        file: RemoteFile,
        *,
        keep: Collection[Path] = (),
        stopped: Callable[[], bool] = never,
    ) -> None:
        """Fetch a shard, or wait for another process's fetch.

        Args:
            store: of the shard.
            folder: of its set in the cache.
            file: the shard.
            keep: shards that must not be removed for it.
            stopped: ends waiting and fetching.

        Raises:
            NoRoom: Nothing more can be removed.
            UserError: As in `hold`.
            Stopped: As in `hold`.
        """
        path = shard_path(folder, file)
        if (file.bytes or 0) > self.limit:
            raise UserError(
                f"--shard-cache-size: {printable(file.name)} alone has "
                f"{gigabytes(file.bytes or 0)}, the cache {gigabytes(self.limit)}"
            )
        with self.explained():
            self.make(folder)
            partial = path.with_name(f".{path.name}.{file.bytes or 0}.partial")
            sink = self._claim(partial, path, stopped)
            if sink is None:
                return
            with sink:
                # What an earlier process left is trusted only where a checksum will tell.
                held = os.fstat(sink.fileno()).st_size if file.checksum is not None else 0
                try:
                    self._make_room(keep)
                    if file.bytes is None:  # room is made for it as it grows
                        sink.grows(self.limit // 8, lambda: self._make_room(keep))
                    download(store, file, sink, self.retry, stopped, held)
                    _touch(sink)
                    os.fdatasync(sink.fileno())  # a name that outlives a power cut means content
                    os.rename(partial, path)
                except (NoRoom, OSError):
                    partial.unlink(missing_ok=True)
                    raise

    def _open_whole(self, folder: Path, file: RemoteFile) -> io.FileIO | None:
        path = shard_path(folder, file)
        with contextlib.ExitStack() as stack, self.explained():
            try:
                held = stack.enter_context(io.FileIO(path, "r", opener=without_links))
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                path.unlink(missing_ok=True)  # a link, by another hand
                return None
            locks.share(held)
            status = os.fstat(held.fileno())
            if status.st_nlink == 0:  # removed between the two lines above
                return None
            if file.bytes is not None and status.st_size != file.bytes:  # by another hand
                path.unlink(missing_ok=True)
                return None
            _touch(held)
            stack.pop_all()
            return held
        return None

    def _claim(self, partial: Path, path: Path, stopped: Callable[[], bool]) -> _Sink | None:
        """Return the partial file, locked; None when the shard has arrived meanwhile."""
        while not path.exists():
            with contextlib.ExitStack() as stack:
                sink = stack.enter_context(_Sink(partial, self._make_way))
                if not locks.try_lock(sink):
                    if stopped():
                        raise Stopped
                    time.sleep(_POLL)
                elif path.exists():  # what was locked is a new file, which nobody needs
                    partial.unlink(missing_ok=True)
                elif _is_at(sink, partial):
                    stack.pop_all()
                    return sink
        return None

    def _make_room(self, keep: Collection[Path]) -> None:
        """Remove shards until shards and reservations fit.

        Raises:
            NoRoom: The rest is in use, or in `keep`.
        """
        left, _ = self._evict(keep, lambda used, _: used <= self.limit)
        if left > self.limit:
            raise NoRoom

    def _make_way(self) -> int:
        """Remove one shard, whatever the limit; return its bytes, 0 if none can be removed."""
        return self._evict((), lambda _, removed: removed > 0)[1]

    def _evict(self, keep: Collection[Path], enough: Callable[[int, int], bool]) -> tuple[int, int]:
        """Remove the least recently used until `enough(used, removed)`; return these two."""
        with open(self.home / ".lock", "a", opener=without_links) as lock:
            locks.lock(lock)
            used, candidates = self._inventory()
            removed = 0
            for _, size, path in candidates:
                if enough(used, removed):
                    break
                if path not in keep and self._remove_unless_used(path):
                    used, removed = used - size, removed + size
                    log.debug(f"{path} makes room for other shards")
        return used, removed

    def _inventory(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Count bytes with reservations, and list removable (last use, bytes, path) by age."""
        used, found = 0, []
        for name in os.listdir(self.home):
            # What has no marker, or is a link, is none of ours.
            with contextlib.suppress(*_NONE_OF_OURS), self._shards_of(name) as folder:
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if not stat.S_ISREG(status.st_mode):
                            continue
                        announced = _announced(folder, entry.name)
                        used += max(announced or 0, status.st_size)
                        if announced is None:
                            path = self.home / name / SHARDS / entry.name
                            found.append((status.st_mtime_ns, status.st_size, path))
        return used, sorted(found)

    @contextlib.contextmanager
    def _shards_of(self, name: str) -> Iterator[int]:
        """Open the shards' folder of a set. Raises OSError: it is none of ours."""
        with (
            opened(self.home, MARKER) as home,
            opened(name, MARKER, home) as folder,
            opened(SHARDS, at=folder) as shards,
        ):
            yield shards

    def _remove_unless_used(self, path: Path) -> bool:
        """Remove a shard that is not in use. Raises OSError."""
        try:
            with (
                self._shards_of(path.parent.parent.name) as folder,
                _open_to_lock(folder, path.name) as file,
            ):
                if not locks.try_lock(file):
                    return False
                os.unlink(path.name, dir_fd=folder)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Convert errors of the folder to a UserError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with contextlib.suppress(OSError):
                    free = shutil.disk_usage(self.root).free
                    raise UserError(
                        f"--shard-cache {self.root}: the disk is full ({gigabytes(free)} free) and "
                        "no shard there can be removed. Free some, choose a folder on another "
                        "disk, or a smaller --shard-cache-size"
                    ) from None
            if error.errno in locks.NO_LOCKS:
                raise UserError(
                    f"--shard-cache {self.root}: this file system has no locks "
                    f"({error.strerror or error}), as many of networks have none; name a folder on "
                    "a local disk of each node"
                ) from None
            advice = "choose another folder"
            if self.root.is_dir() and not os.access(self.root, os.W_OK):
                advice = "let its owner open it to all who are to use it (chmod 1777), or " + advice
            raise UserError(
                f"--shard-cache {self.root} cannot be used: {error.strerror or error}; {advice}"
            ) from None


class _Sink(io.FileIO):
    """Partial file. When the disk is full, shards are evicted for it."""

    def __init__(self, path: Path, make_way: Callable[[], int]) -> None:
        super().__init__(without_links(str(path), os.O_RDWR | os.O_CREAT), "r+")
        self._make_way = make_way
        self._make_room: Callable[[], None] = lambda: None
        self._step = self._written = 0

    def grows(self, step: int, make_room: Callable[[], None]) -> None:
        """Call `make_room` after each so many bytes."""
        self._step, self._make_room = step, make_room

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data)
        while view:
            try:
                view = view[self._write_some(view) :]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not self._make_way():
                    raise
        self._written += len(data)
        if self._step and self._written >= self._step:
            self._written = 0
            self._make_room()
        return len(data)

    def _write_some(self, data: memoryview) -> int:
        return super().write(data)


def _touch(file: io.FileIO) -> None:
    """Record the use; by a finer clock than the kernel's own time stamps."""
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))


def _is_at(file: io.FileIO, path: Path) -> bool:
    """Tell whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_to_lock(folder: int, name: str) -> io.FileIO:
    """To be locked for this process alone, for which a network's file system (NFS) wants to write.

    folder: a descriptor of it.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    return io.FileIO(os.open(name, flags, dir_fd=folder), "r+")


def _announced(folder: int, name: str) -> int | None:
    """Return the reserved bytes of a shard being fetched.

    None for a whole shard, and for one left by a process that has ended.
    """
    partial = _PARTIAL.fullmatch(name)
    if partial is None:
        return None
    with _open_to_lock(folder, name) as file:
        if locks.try_lock(file):
            return None
    return int(partial.group(1))


def write_once(path: Path, content: bytes) -> None:
    """Write a file atomically, also if others write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content, shared=True)
