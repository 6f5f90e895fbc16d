"""Portable checkpoint: global state under plain names, independent of engine and ranks.

A folder with the tensors, written by ``torch.distributed.checkpoint``, and ``meta.json``. It is
written under a temporary name and renamed when complete. Loading executes no pickled code.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moco_scale.checkpoints.meta import FORMAT, INDEX, parse_meta, sealed, usable
from moco_scale.checkpoints.rows import Rows, RowsSavePlanner
from moco_scale.distributed import collectives, consensus
from moco_scale.untrusted.checkpoint_index import Chunk, Entry, parse_index
from moco_scale.untrusted.documents import DocumentError, read_bounded, read_json
from moco_scale.untrusted.limits import CHECKPOINT_INDEX, META_JSON
from moco_scale.untrusted.pickles import PickleError
from moco_scale.untrusted.tensor_files import StoredTensor, TensorFile, describe
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import failure_reason, sync, write_atomically
from moco_scale.utils.log import log
from moco_scale.utils.text import printable_path, some_of

T = TypeVar("T")
NO_ROWS: Mapping[str, Rows] = MappingProxyType({})
META = "meta.json"
STEP = "step-"
"""Beginning of the name of a checkpoint's folder."""
STEP_FOLDER = re.compile(STEP + r"([0-9]{8,})")


def owner(name: str) -> int:
    """Rank that writes a tensor: a function of its name, so that no message is needed."""
    return zlib.crc32(name.encode()) % collectives.world_size()


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    group: Any = None,
    rows: Mapping[str, Rows] = NO_ROWS,
) -> None:
    """Write one checkpoint; all ranks call it, each with the full tensors that it owns.

    Args:
        folder: final name; must not exist.
        tensors: global state by plain name; several ranks may give the same name.
        meta: plain values beside them.
        group: of :func:`distributed.side_group`, when called from another thread.
        rows: this rank's rows of sharded tensors; all ranks' rows make up the whole.

    Raises:
        UserError: It cannot be written (disk full, no permission); nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    main, detached = collectives.is_main(), {name: t.detach() for name, t in tensors.items()}

    def begin() -> tuple[Any, Any]:
        if main:
            _make_empty(temporary)
        return dcp.FileSystemWriter(temporary, sync_files=True), RowsSavePlanner(rows)

    def write() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(
                detached,
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=collectives.world_size() == 1,
            )

    # Ranks synchronise after each: none starts a stage that another does not.
    writer, planner = _attempt(begin, temporary, group)
    _attempt(write, temporary, group)
    _attempt(lambda: _complete(temporary, folder, meta) if main else None, temporary, group)


def _make_empty(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)  # left by a process that was killed while saving
    folder.mkdir()


def _complete(temporary: Path, folder: Path, meta: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    sums = {name: _checksum(temporary / name) for name in sizes}
    content = {"format": FORMAT, **meta, "files": sizes, "crc32": sums}
    write_atomically(temporary / META, sealed(json.dumps(content, indent=1)))
    sync(temporary)
    if folder.exists() and not (folder / META).is_file():
        os.rename(folder, folder.with_name(f".{folder.name}.incomplete"))  # such as a partial copy
    os.rename(temporary, folder)
    sync(folder.parent)


def _attempt(action: Callable[[], T], temporary: Path, group: Any) -> T:
    """Run on every rank; any failure on one becomes the same error on all.

    The incomplete checkpoint is then removed.
    """

    def named() -> T:
        try:
            return action()
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
            if not isinstance(error, OSError | RuntimeError | dcp.api.CheckpointException):
                traceback.print_exception(error)  # a bug: its place helps to fix it
            raise UserError(
                f"cannot write the checkpoint {temporary.parent}: {failure_reason(error)}; earlier "
                "checkpoints are untouched: make room or fix the folder, then start again"
            ) from error

    try:
        return consensus.raise_on_all_ranks(named, group)
    except UserError:
        if collectives.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def readable_meta(folder: Path) -> dict[str, Any]:
    """Return the valid plain values of a damaged checkpoint, perhaps none."""
    try:
        return usable(read_json(folder / META, META_JSON, "checkpoint file"))
    except UserError:
        return {}


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the plain values of a checkpoint, after checking that it is complete.

    Raises:
        UserError: It is no checkpoint of this project, incomplete, or of another format.
    """
    return _read_meta(folder)[0]


def _read_meta(folder: Path) -> tuple[dict[str, Any], bool]:
    """Read the plain values, and whether a checksum covers them."""
    what = f"checkpoint {printable_path(folder)}"
    try:
        if not folder.is_dir():
            raise UserError(f"no {what}: there is no such folder")
        if not (folder / META).is_file():
            raise UserError(f"{what} is incomplete, or not of moco_scale: it has no {META}")
        content = read_bounded(folder / META, META_JSON, "checkpoint file")
        meta, sealed_ = parse_meta(content, what)
        for name, size in meta["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{what} is damaged: {name} {state}, {size} expected")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {failure_reason(error)}") from None
    step = STEP_FOLDER.fullmatch(folder.name)
    if step is not None and int(step.group(1)) != meta["step"]:
        raise UserError(
            f"{what} is damaged, or its folder has been renamed: its {META} is of step "
            f"{meta['step']}"
        )
    return meta, sealed_


def verify(folder: Path) -> None:
    """Compare every file with its checksum.

    Raises:
        UserError: A file is not what was written, or has no checksum.
    """
    meta, sealed_ = _read_meta(folder)
    sums, what = meta["crc32"], f"checkpoint {printable_path(folder)}"
    for name, expected in sums.items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise UserError(f"{what} cannot be read: {failure_reason(error)}") from None
        if found != expected:
            raise UserError(f"{what} is damaged: the content of {name} is not what was written")
    places = {chunk.file for entry in read_index(folder).values() for chunk in entry.chunks}
    missing = sorted({INDEX, *places} - sums.keys())
    if missing:
        raise UserError(f"{what} is damaged: {META} does not list {', '.join(missing[:3])}")
    if not sealed_:
        log.warning(f"{what} is of an earlier version: its {META} has no checksum of its own")


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def shapes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return shape, numbers and bytes of each tensor of a checkpoint, without reading values.

    Raises:
        UserError: The index is damaged, or names anything but tensors.
    """
    found = {}
    for name, entry in read_index(folder).items():
        numbers = math.prod(entry.shape)
        found[name] = {
            "shape": list(entry.shape),
            "numbers": numbers,
            "bytes": numbers * entry.dtype.itemsize,
        }
    return found


def read_index(folder: Path) -> dict[str, Entry]:
    """Read the tensors' names and their places in the files, which must exist.

    Raises:
        UserError: The index is damaged or impossible.
    """
    try:
        entries = parse_index(read_bounded(folder / INDEX, CHECKPOINT_INDEX, "its index"))
        chunks = [chunk for entry in entries.values() for chunk in entry.chunks]
        sizes = {name: (folder / name).stat().st_size for name in {c.file for c in chunks}}
        used: Counter[str] = Counter()
        for chunk in chunks:
            # Chunks that share bytes would take more memory than the files have.
            used[chunk.file] += chunk.length
            if max(used[chunk.file], chunk.offset + chunk.length) > sizes[chunk.file]:
                raise PickleError(f"{chunk.file} has fewer bytes than its index says")
    except (OSError, PickleError, DocumentError) as error:
        raise _unreadable(folder, error) from None
    return entries


def _unreadable(folder: Path, error: Exception) -> UserError:
    reason = failure_reason(error)
    return UserError(f"checkpoint {printable_path(folder)} cannot be read: {reason}")


def load(
    folder: Path,
    rows: Mapping[str, Rows] = NO_ROWS,
    expected: Mapping[str, Expected] | None = None,
) -> dict[str, Tensor]:
    """Load all tensors of a checkpoint to the CPU; each rank reads by itself.

    Args:
        folder: of the checkpoint.
        rows: rows to read of some tensors, by name; the others are read whole.
        expected: tensors that must be there, checked before any is read; None: no check.

    Raises:
        UserError: The folder is damaged, holds anything but tensors, or not the expected ones.
    """
    entries = read_index(folder)
    if expected is not None:
        _require(folder, entries, expected)
    try:
        return {name: _load(folder, entry, rows.get(name)) for name, entry in entries.items()}
    except (OSError, PickleError) as error:
        raise _unreadable(folder, error) from None


def _load(folder: Path, entry: Entry, rows: Rows | None) -> Tensor:
    if rows is None:
        if len(entry.chunks) == 1:
            whole = _read_chunk(folder, entry, entry.chunks[0])
            return whole if entry.shape else whole[0]
        total = entry.shape[0] if entry.shape else 1
        rows = Rows(0, total, total)
    elif not entry.shape or entry.shape[0] != rows.total:
        raise PickleError(f"a tensor has the shape {list(entry.shape)}, not {rows.total} rows")
    whole = torch.empty((rows.size, *entry.shape[1:]), dtype=entry.dtype)
    for chunk in entry.chunks:
        first = max(rows.first, chunk.first)
        end = min(rows.first + rows.size, chunk.first + chunk.rows)
        if first < end:
            some = _read_chunk(folder, entry, chunk)[first - chunk.first : end - chunk.first]
            whole[first - rows.first : end - rows.first] = some
    return whole if entry.shape else whole[0]


def _read_chunk(folder: Path, entry: Entry, chunk: Chunk) -> Tensor:
    """Read the rows of a chunk; a scalar is one row."""
    with TensorFile(folder / chunk.file, chunk.offset, chunk.length) as file:
        stored = file.content
        shape = (chunk.rows, *entry.shape[1:]) if entry.shape else ()
        if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (
            entry.dtype,
            shape,
        ):
            raise PickleError(f"{chunk.file} does not hold what the index says")
        rows = file.read(stored)
    return rows if entry.shape else rows[None]


class Expected(NamedTuple):
    """Tensor that a checkpoint must, or may, hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    optional: bool = False


def _require(folder: Path, entries: Mapping[str, Entry], expected: Mapping[str, Expected]) -> None:
    problems = [
        f"it lacks {name}"
        for name, wanted in expected.items()
        if name not in entries and not wanted.optional
    ]
    problems += [
        f"{name} is {describe(entry.dtype, entry.shape)}, "
        f"{describe(wanted.dtype, wanted.shape)} expected"
        for name, entry in entries.items()
        for wanted in [expected.get(name)]
        if wanted is not None and (entry.dtype, entry.shape) != wanted[:2]
    ]
    problems += [f"it has {name}, which is unknown" for name in entries.keys() - expected.keys()]
    refuse(folder, problems)


def refuse(folder: Path, problems: list[str]) -> None:
    """Raise an error if a checkpoint has problems.

    Raises:
        UserError: There are problems; the message has five at most.
    """
    if problems:
        raise UserError(
            f"checkpoint {printable_path(folder)} does not fit this run: "
            f"{some_of(problems, between='; ')}; continue from another one (--resume), or "
            "start anew in another --output-dir"
        )
