"""Tars elsewhere that have no index: all of them are fetched once to make it.

The index is kept in the user's cache (``$MOCO_SCALE_CACHE/index`` or ``~/.cache/moco_scale/index``)
and not beside the shards, so that the nodes of a cluster that share a home make it once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moco_scale.data import index_file
from moco_scale.data.download import RemoteFile
from moco_scale.data.progress import Progress
from moco_scale.data.remote import Place, place
from moco_scale.data.remote_shards import RemoteShards
from moco_scale.data.scanned_index import alone, write_index
from moco_scale.data.shard_cache import ShardCache, cache_home, shard_path
from moco_scale.data.shard_list import expand_braces, splits_of
from moco_scale.data.shard_source import ShardSource
from moco_scale.data.tar_scan import ShardScan, scan_tar
from moco_scale.errors import UserError

_FETCHERS = 4


class RemoteTars(NamedTuple):
    """What a pattern of addresses names."""

    place: Place
    """The folder above the first brace."""
    splits: dict[str, list[str]]
    """Names below it, in the order of the pattern."""


def is_remote_pattern(spec: str) -> bool:
    """Whether an address stands for several."""
    return not spec.startswith("pipe:") and "{" in spec


def remote_tars(source: ShardSource) -> RemoteTars:
    """The tars that a pattern such as `https://host/train-{000000..000099}.tar` names.

    Splits are told by their names, as those of tars in a folder. Raises UserError: as `place`,
    `expand_braces` and `splits_of` do.
    """
    path, mark, query = source.spec.partition("?")
    folder = path[: path.index("{")].rpartition("/")[0]
    names = expand_braces(path[len(folder) + 1 :])
    splits: dict[str, list[str]] = {}
    # Nothing is looked up: these paths are names with slashes.
    told = splits_of(str(source), [Path("/") / name for name in names], Path("/"))
    for split, name in zip(told, names, strict=True):
        splits.setdefault(split, []).append(name)
    return RemoteTars(place(f"{folder}{mark}{query}", source.allow_pipe), splits)


def open_remote_tars(source: ShardSource, split: str) -> RemoteShards:
    """The pictures of a split of such tars; makes their index if there is none yet.

    Raises UserError: no such split; a tar is not to be had or damaged; a cache cannot be written.
    """
    tars, cache, name = remote_tars(source), source.cache, str(source)
    if split not in tars.splits:
        raise UserError(
            f"{name} has no split {split!r}; by their names its tars are: "
            f"{', '.join(sorted(tars.splits))}."
        )
    key = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    folder, index_dir = cache.root / f"tars-{key}", cache_home() / "index" / f"remote-{key}"
    try:
        index_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The index of {name} cannot be written to {index_dir}: {error.strerror or error}. "
            "Name a folder that can be written in the environment variable MOCO_SCALE_CACHE."
        ) from error
    path = index_dir / index_file.INDEX_JSON
    with alone(index_dir / ".lock", f"{name}: another process makes the index; waiting"):
        if not path.exists():
            _build(name, tars, cache, folder, index_dir)
    try:
        header = index_file.parse_header(path.read_bytes(), path, anywhere=True)
        rows = index_file.read_rows(index_dir, split, header)
    except (OSError, UserError) as error:
        raise UserError(
            f"The index of {name} in {index_dir} cannot be used ({error}); remove that folder to "
            "make it again"
        ) from error
    return RemoteShards(index_dir, split, header, rows, None, name, folder, tars.place, cache)


def _build(name: str, tars: RemoteTars, cache: ShardCache, folder: Path, index_dir: Path) -> None:
    started = time.monotonic()
    names = [tar for members in tars.splits.values() for tar in members]
    scan = functools.partial(_scan, tars.place, cache, folder)
    scans, sizes, checksums = [], {}, {}
    pool = ThreadPoolExecutor(_FETCHERS)
    try:
        with Progress(f"fetching and indexing {name}", len(names), "shards") as progress:
            for tar, (found, size, checksum) in zip(names, pool.map(scan, names), strict=True):
                scans.append(found)
                sizes[tar], checksums[tar] = size, checksum
                progress.add(1)
    finally:
        pool.shutdown(cancel_futures=True)
    write_index(name, tars.splits, scans, sizes, index_dir, started, checksums)


def _scan(place: Place, cache: ShardCache, folder: Path, name: str) -> tuple[ShardScan, int, str]:
    """What a tar holds, its size and its checksum."""
    file = RemoteFile(name)
    with cache.hold(place, folder, file) as held:
        path = shard_path(folder, file)
        try:
            scan = scan_tar(path)
        except UserError as error:
            path.unlink(missing_ok=True)
            raise UserError(str(error).replace(str(path), place.address(name))) from None
        digest = hashlib.file_digest(held, lambda: hashlib.blake2b(digest_size=16))  # type: ignore[arg-type, return-value]
        return scan, os.fstat(held.fileno()).st_size, digest.hexdigest()
