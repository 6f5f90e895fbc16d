"""The portable checkpoint: global state under plain names, whichever engine and ranks wrote it.

A folder with the tensors as ``torch.distributed.checkpoint`` writes them and ``meta.json``. It is
written under a temporary name and renamed when complete. Loading executes no pickled code.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moco_scale import distributed, together
from moco_scale.checkpoint_rows import Rows, RowsLoadPlanner, RowsSavePlanner
from moco_scale.errors import UserError
from moco_scale.files import failure_reason, read_json, sync_folder

T = TypeVar("T")
FORMAT = 1
NO_ROWS: Mapping[str, Rows] = MappingProxyType({})
META, INDEX = "meta.json", ".metadata"


def owner(name: str) -> int:
    """The rank that writes a tensor: a function of its name, so that nobody has to ask."""
    return zlib.crc32(name.encode()) % distributed.world_size()


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
        tensors: global state by plain name; a name may be given by several ranks.
        meta: plain values kept beside it.
        group: of :func:`distributed.side_group`, when called from another thread.
        rows: of which tensors this rank gives only some rows, and which; the ranks' rows make up
            the whole.

    Raises:
        UserError: it cannot be written (disk full, no permission); nothing is left of it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    main, detached = distributed.is_main(), {name: t.detach() for name, t in tensors.items()}

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
                no_dist=distributed.world_size() == 1,
            )

    # After each, ranks hear of each other: none begins what another does not.
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
    with open(temporary / META, "w", encoding="utf-8") as file:
        sums = {name: _checksum(temporary / name) for name in sizes}
        json.dump({"format": FORMAT, **meta, "files": sizes, "crc32": sums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    if folder.exists() and not (folder / META).exists():
        os.rename(folder, folder.with_name(f".{folder.name}.incomplete"))  # such as a partial copy
    os.rename(temporary, folder)
    sync_folder(folder.parent)


def _attempt(action: Callable[[], T], temporary: Path, group: Any) -> T:
    """Run on every rank; what goes wrong on one becomes the same error everywhere.

    Whatever it is: the others wait to hear of it. No part of the checkpoint is left then.
    """

    def named() -> T:
        try:
            return action()
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
            if not isinstance(error, OSError | RuntimeError | dcp.api.CheckpointException):
                traceback.print_exception(error)  # a defect: where it is helps to mend it
            raise UserError(
                f"cannot write the checkpoint {temporary.parent}: {failure_reason(error)}; earlier "
                "checkpoints are untouched: make room or fix the folder, then start again"
            ) from error

    try:
        return together.agree(named, group)
    except UserError:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_table(value: Any) -> bool:
    """Numbers of files, by names that lead nowhere else."""
    return isinstance(value, dict) and all(
        Path(name).name == name and _is_count(number) for name, number in value.items()
    )


# What the rest of the program relies on. A run's checkpoints have the latter three too.
_MEANING: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "files": _is_table,
    "crc32": _is_table,
    "config": lambda value: isinstance(value, dict),
    "keep": lambda value: isinstance(value, bool),
    "unlogged": lambda value: value is None or _is_log(value),
}
_MAY_LACK = ("config", "keep", "unlogged")


def _is_log(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("record"), dict)
        and isinstance(value.get("line"), str)
    )


def _means(meta: dict[str, Any], name: str) -> bool:
    return _MEANING[name](meta[name]) if name in meta else name in _MAY_LACK


def readable_meta(folder: Path) -> dict[str, Any]:
    """Of a checkpoint that is damaged, those plain values that are what they should be.

    Empty where there are none.
    """
    try:
        meta = read_json(folder / META, "checkpoint file")
    except UserError:
        return {}
    if not isinstance(meta, dict):
        return {}
    return {name: v for name, v in meta.items() if name not in _MEANING or _means(meta, name)}


def read_meta(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, after checking that it is whole.

    Raises:
        UserError: not a checkpoint of this project, incomplete, or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"no checkpoint {folder}: there is no such folder")
    if not (folder / META).is_file():
        raise UserError(f"{folder} is not a complete checkpoint of moco_scale: it has no {META}")
    meta = read_json(folder / META, "checkpoint file")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(
            f"{folder} is not a checkpoint of format {FORMAT}, which this version reads"
        )
    wrong = [name for name in _MEANING if not _means(meta, name)]
    if wrong or meta["files"].keys() != meta["crc32"].keys():
        raise UserError(
            f"checkpoint {folder} is damaged, or none of moco_scale: its {META} has no usable "
            f"{', '.join(wrong) or 'crc32 of each of its files'}"
        )
    for name, size in meta["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"checkpoint {folder} is damaged: {name} {state}, {size} expected")
    return meta


def verify(folder: Path) -> None:
    """Compare every file with the checksum that was written beside it.

    Raises:
        UserError: a file is not what was written, or its checksum is not there.
    """
    sums = read_meta(folder)["crc32"]
    for name, expected in sums.items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise UserError(
                f"checkpoint {folder} cannot be read: {failure_reason(error)}"
            ) from None
        if found != expected:
            raise UserError(
                f"checkpoint {folder} is damaged: the content of {name} is not what was written"
            )
    missing = sorted({INDEX, *_files_of(folder)} - sums.keys())
    if missing:
        raise UserError(
            f"checkpoint {folder} is damaged: {META} does not list {', '.join(missing[:3])}"
        )


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def shapes(folder: Path) -> dict[str, dict[str, Any]]:
    """Shape, numbers and bytes of each tensor of a checkpoint, without reading their values.

    Raises:
        UserError: the index is damaged, or names anything but tensors.
    """
    found = {}
    for name, entry in _entries(_Reader(folder), folder).items():
        numbers = entry.size.numel()
        found[name] = {
            "shape": list(entry.size),
            "numbers": numbers,
            "bytes": numbers * entry.properties.dtype.itemsize,
        }
    return found


_UNREADABLE = (
    *(OSError, RuntimeError, AttributeError, KeyError, ValueError, TypeError, EOFError),
    *(pickle.UnpicklingError, dcp.api.CheckpointException),
)


def _files_of(folder: Path) -> set[str]:
    """The files that hold its tensors, as its index says."""
    try:
        places = _Reader(folder).read_metadata().storage_data.values()
        return {str(place.relative_path) for place in places}
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {folder} cannot be read: {failure_reason(error)}") from None


def _entries(reader: _Reader, folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = reader.read_metadata().state_dict_metadata
        for name, entry in metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is not a tensor")
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {folder} cannot be read: {failure_reason(error)}") from None
    return cast(dict[str, TensorStorageMetadata], metadata)


def load(folder: Path, rows: Mapping[str, Rows] = NO_ROWS) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU; each rank reads by itself.

    Args:
        folder: of the checkpoint.
        rows: of which tensors, where there are such, to read only some rows, and which.

    Raises:
        UserError: the folder is damaged, or holds anything but tensors.
    """
    reader = _Reader(folder)
    try:
        tensors = {}
        for name, entry in _entries(reader, folder).items():
            size = list(entry.size)
            if name in rows:
                if size[0] != rows[name].total:
                    raise ValueError(f"{name} has {size[0]} rows, not {rows[name].total}")
                size[0] = rows[name].size
            tensors[name] = torch.empty(size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=reader, planner=RowsLoadPlanner(rows), no_dist=True)
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {folder} cannot be read: {failure_reason(error)}") from None
    return tensors


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose index file is a pickle: only its own plain classes are let in."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("its index is not one of torch.distributed.checkpoint")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    ALLOWED: ClassVar[dict[str, frozenset[str]]] = {
        "torch.distributed.checkpoint.metadata": frozenset(
            {
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
            }
        ),
        "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
        "torch.serialization": frozenset({"_get_layout"}),
        "torch": frozenset({"Size", "float32", "float64", "bfloat16", "float16", "int64", "uint8"}),
        "pathlib": frozenset({"PosixPath", "PurePosixPath", "Path", "WindowsPath"}),
        "collections": frozenset({"OrderedDict"}),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"its index names {module}.{name}, which no checkpoint contains; nothing was run"
            )
        return super().find_class(module, name)
