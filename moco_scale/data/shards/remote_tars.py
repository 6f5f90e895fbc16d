"""Remote tars without an index: all are fetched once to make it.

The index is kept in the user's cache (``$MOCO_SCALE_CACHE/index`` or ``~/.cache/moco_scale/index``)
and not beside the shards, so that the nodes of a cluster that share a home make it once. The scan
of each tar is kept there too, as soon as it is made: an interrupted run continues from there, and
of replaced tars only those are fetched and scanned again. A run makes a small index by itself, in
less than a minute; for a larger one it names the command that does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moco_scale.data.remote.addresses import shown
from moco_scale.data.remote.download import RemoteFile, TooLarge, state_of
from moco_scale.data.remote.fsspec_store import store_at
from moco_scale.data.remote.shard_cache import GB, cache_home, gigabytes, shard_path, write_once
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.remote.store import FileState, Store
from moco_scale.data.shards import index_file
from moco_scale.data.shards.index_place import alone
from moco_scale.data.shards.remote_shards import RemoteShards
from moco_scale.data.shards.saved_scans import (
    SavedScan,
    load_scan,
    save_scan,
    scan_path,
    version_of,
)
from moco_scale.data.shards.scanned_index import write_index
from moco_scale.data.shards.shard_list import COMPRESSED_TAR, expand_braces, splits_of
from moco_scale.data.shards.tar_scan import scan_tar
from moco_scale.untrusted.documents import read_bounded
from moco_scale.untrusted.limits import NAME_BYTES
from moco_scale.utils.errors import UserError
from moco_scale.utils.progress import Progress

_FETCHERS = 4
_ASKERS = 16
_FEW, _LITTLE = 64, 2 * GB  # tars, and bytes of them, that a run fetches to make an index
_FRESH = 60.0  # seconds for which what was asked of all tars need not be asked again


class RemoteTarList(NamedTuple):
    """Remote tars that a pattern of addresses names."""

    store: Store
    """The folder above the first brace."""
    splits: dict[str, list[str]]
    """Names below it, in the order of the pattern."""

    @property
    def names(self) -> list[str]:
        return [name for members in self.splits.values() for name in members]


def is_remote_pattern(spec: str) -> bool:
    """Tell whether an address names tars, and not a folder of shards with an index."""
    path = spec.partition("?")[0]
    below = path.partition("://")[2].partition("/")[2]
    is_tar = below.lower().endswith(".tar") or COMPRESSED_TAR.search(below) is not None
    return "{" in path or is_tar


def remote_tars(source: ShardSource) -> RemoteTarList:
    """The tars that a pattern such as `https://host/train-{000000..000099}.tar` names.

    Splits are told by their names, as those of tars in a folder. Raises UserError: as `store_at`,
    `expand_braces` and `splits_of` do; tars are compressed, or named twice.
    """
    path, mark, query = source.spec.partition("?")
    folder = path.partition("{")[0].rpartition("/")[0]
    names = expand_braces(path[len(folder) + 1 :])
    if len(set(names)) < len(names):
        raise UserError(f"{source} names a tar twice")
    for name in names:
        if COMPRESSED_TAR.search(name):
            raise UserError(
                f"{shown(folder)}/{name} is compressed: images in it cannot be reached on their "
                "own. Decompress it and its like where they lie; tars of images need no "
                "compression"
            )
    splits: dict[str, list[str]] = {}
    # Nothing is looked up: these paths are names with slashes.
    told = splits_of(str(source), [Path("/") / name for name in names], Path("/"))
    for split, name in zip(told, names, strict=True):
        splits.setdefault(split, []).append(name)
    return RemoteTarList(store_at(f"{folder}{mark}{query}"), splits)


def index_remote_tars(source: ShardSource) -> None:
    """Make the index of such tars, if there is none yet, however long that takes.

    Raises UserError: a tar is not to be had or damaged; a cache cannot be written.
    """
    _Indexing(source, remote_tars(source)).done(limited=False)


def open_remote_tars(source: ShardSource, split: str) -> RemoteShards:
    """The images of a split of such tars; makes their index if there is none yet.

    Raises UserError: no such split; the index is missing and takes long to make (the message has
    the command that makes it); a tar is not to be had or damaged; a cache cannot be written.
    """
    tars, cache, name = remote_tars(source), source.cache, str(source)
    if split not in tars.splits:
        raise UserError(
            f"{name} has no split {split!r}; by their names its tars are: "
            f"{', '.join(sorted(tars.splits))}."
        )
    indexing = _Indexing(source, tars)
    index_dir = indexing.done()
    try:
        header = index_file.read_scanned_header(index_dir, tars.splits)
        rows = index_file.read_rows(index_dir, split, header)
    except UserError as error:
        raise UserError(
            f"The index of {name} in {index_dir} cannot be used ({error}); remove that folder to "
            "make it again"
        ) from error
    files = [
        RemoteFile(tar, shard.bytes, shard.checksum, shard.version, indexing.scan_of(tar))
        for tar, shard in zip(tars.splits[split], header.splits[split].shards, strict=True)
    ]
    where = name, indexing.folder, tars.store, cache
    return RemoteShards(index_dir, split, header, rows, None, files, *where)


class _Indexing:
    """Maker, or finder, of the index of a set of remote tars.

    Attributes:
        folder: of the set in the cache.
    """

    def __init__(self, source: ShardSource, tars: RemoteTarList) -> None:
        self._name, self._tars, self._cache = str(source), tars, source.cache
        self._command = f"python -m moco_scale shard --index {shlex.quote(self._name)}"
        if source.cache_dir:
            self._command += f" --shard-cache {shlex.quote(source.cache_dir)}"
        if self._name != source.spec:
            self._command += " (with the address as it was given)"
        # A signature changes from day to day; what else an address says, the tars depend on.
        http = source.spec.lower().startswith("http")
        self._identity = self._name if http else source.spec
        self._key = hashlib.blake2b(self._identity.encode(), digest_size=8).hexdigest()
        self.folder = source.cache.home / f"tars-{self._key}"
        self._home = cache_home() / "index"
        self._scans = self._home / "scans"
        self._stamp = self._home / f"remote-{self._key}.checked"
        self._stopped = threading.Event()

    def done(self, limited: bool = True) -> Path:
        """Return the folder of the index, made if there is none yet.

        Raises UserError, also where making it takes long and is `limited`.
        """
        waiting = f"{self._name}: another process makes the index; waiting"
        with self._written():
            self._scans.mkdir(parents=True, exist_ok=True)
            with alone(self._home / f"remote-{self._key}.lock", waiting, self._scans):
                found = self._just_checked()
                if found is None:
                    found = self._made(limited)
                    write_once(self._stamp, found.name.encode())
                return found

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The index of {self._name} cannot be written to {self._home}: "
                f"{error.strerror or error}. Name a folder that can be written in the environment "
                "variable MOCO_SCALE_CACHE."
            ) from error

    def _just_checked(self) -> Path | None:
        """Return the index if another process has just checked it."""
        with contextlib.suppress(OSError, UserError):
            if abs(time.time() - self._stamp.stat().st_mtime) < _FRESH:
                name = read_bounded(self._stamp, NAME_BYTES, "The stamp").decode(errors="replace")
                found = self._home / name
                ours = re.fullmatch(rf"remote-{self._key}-[0-9a-f]+", name)
                if ours and (found / index_file.INDEX_JSON).exists():
                    return found
        return None

    def _made(self, limited: bool) -> Path:
        started = time.monotonic()
        scans = self._all_scans(limited)
        versions = hashlib.blake2b(digest_size=6)
        for name, saved in scans.items():
            versions.update(f"{name}\0{saved.version}\n".encode())
        found = self._home / f"remote-{self._key}-{versions.hexdigest()}"
        if (found / index_file.INDEX_JSON).exists():
            return found
        sizes = {name: saved.bytes for name, saved in scans.items()}
        remarks = {
            name: {"checksum": saved.checksum, "version": saved.version}
            for name, saved in scans.items()
        }
        every = [saved.scan for saved in scans.values()]
        write_index(self._name, self._tars.splits, every, sizes, found, started, remarks)
        for old in self._home.glob(f"remote-{self._key}-*"):  # of the tars as they were before
            if old != found:
                shutil.rmtree(old, ignore_errors=True)
        return found

    def _all_scans(self, limited: bool) -> dict[str, SavedScan]:
        """Return scans of all tars in order; unknown or changed tars are fetched."""
        names, scans = self._tars.names, dict[str, SavedScan]()
        with ThreadPoolExecutor(_ASKERS) as askers:
            states = dict(zip(names, askers.map(self._state, names), strict=True))
        for name in names:
            saved = load_scan(self._scan_path(name))
            if saved is not None and saved.state.same(states[name]):
                scans[name] = saved
        missing = [name for name in names if name not in scans]
        if limited:
            self._require_little([states[name].bytes for name in missing])
        if missing:
            label = f"fetching and indexing {self._name}"
            # A tar of unknown size may take up all of the cache.
            single = any(states[name].bytes is None for name in missing)
            with (
                self._fetchers(1 if single else _FETCHERS) as fetchers,
                Progress(label, len(names), "shards") as progress,
            ):
                progress.add(len(scans))
                found = fetchers.map(lambda name: self._scan(name, states[name]), missing)
                for name, saved in zip(missing, found, strict=True):
                    scans[name] = saved
                    progress.add(1)
        return {name: scans[name] for name in names}

    def _require_little(self, sizes: list[int | None]) -> None:
        """Raise UserError for more than a run fetches itself. sizes: of tars, None: unknown."""
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes) <= _FEW and sum(known) <= _LITTLE:
            return
        size = gigabytes(sum(known)) if len(known) == len(sizes) else "of unknown size"
        raise UserError(
            f"{self._name}: {len(sizes)} of {len(self._tars.names)} tars ({size}) have to be "
            "fetched once to make their index. Do that before the run, on every machine with a "
            f"cache of its own: {self._command}"
        )

    @contextlib.contextmanager
    def _fetchers(self, count: int) -> Iterator[ThreadPoolExecutor]:
        pool = ThreadPoolExecutor(count)
        try:
            yield pool
        finally:  # an error or an interruption does not wait for what is on its way
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    def _scan_path(self, name: str) -> Path:
        folder = self._identity.partition("{")[0].rpartition("/")[0]
        return scan_path(self._scans, f"{folder}/{name}")

    def scan_of(self, name: str) -> str:
        """Return the path of a tar's saved scan."""
        return str(self._scan_path(name))

    def _file(self, name: str, state: FileState) -> RemoteFile:
        scan, most = self.scan_of(name), self._cache.limit
        return RemoteFile(name, state.bytes, version=version_of(state), scan=scan, most=most)

    def _state(self, name: str) -> FileState:
        file = self._file(name, FileState())
        return state_of(self._tars.store, file, self._cache.retry)

    def _scan(self, name: str, state: FileState) -> SavedScan:
        """Fetch and scan a tar, and save the scan."""
        file, where = self._file(name, state), self._tars.store
        try:
            got = self._cache.hold(where, self.folder, file, stopped=self._stopped.is_set)
        except TooLarge as error:
            raise UserError(
                f"{error}: --shard-cache-size is {gigabytes(self._cache.limit)}"
            ) from None
        with got as held:
            path = shard_path(self.folder, file)
            try:
                scan = scan_tar(path)
            except UserError as error:
                path.unlink(missing_ok=True)
                raise UserError(str(error).replace(str(path), where.address(name))) from None
            digest = hashlib.file_digest(held, lambda: hashlib.blake2b(digest_size=16))  # type: ignore[arg-type, return-value]
            size = os.fstat(held.fileno()).st_size
        saved = SavedScan(scan, size, digest.hexdigest(), state)
        save_scan(self._scan_path(name), saved)
        return saved
