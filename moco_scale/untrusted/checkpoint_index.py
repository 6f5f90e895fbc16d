"""Index (``.metadata``) of a checkpoint: its tensors, and their bytes in its files.

``torch.distributed.checkpoint`` writes it as a pickle of its own classes; here it is plain data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from moco_scale.untrusted.limits import KB
from moco_scale.untrusted.names import plain_problem
from moco_scale.untrusted.pickles import ORDERED_DICT, Name, PickleError, Record, read_pickle
from moco_scale.untrusted.tensor_files import DTYPES, are_counts, is_shape
from moco_scale.utils.text import printable

_HERE = "torch.distributed.checkpoint.metadata "
_DTYPES = {f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in DTYPES}
_PATHS = [
    f"{module} {kind}Path"
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Posix", "PurePosix", "Windows")
]
_PLACE = "torch.distributed.checkpoint.filesystem _StorageInfo"
_CLASSES = (
    *("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta"),
)
_NAMES = frozenset(
    {
        *(_HERE + name for name in _CLASSES),
        *(_PLACE, "torch.serialization _get_layout", "torch Size", ORDERED_DICT),
        *_DTYPES,
        *_PATHS,
    }
)
# A chunk's file of torch.save is so much larger than its numbers, at most.
_AROUND = 64 * KB


class Chunk(NamedTuple):
    """Consecutive rows of a tensor (a scalar has one), and their place.

    Attributes:
        first: the first row.
        rows: their number.
        file: its name in the checkpoint's folder.
        offset: of the first byte.
        length: in bytes, of a file of ``torch.save`` with these rows.
    """

    first: int
    rows: int
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Entry:
    """Tensor of a checkpoint; its chunks are all of its rows, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def parse_index(content: bytes) -> dict[str, Entry]:
    """Read an index.

    Raises:
        PickleError: It is damaged, or lacks the places of a tensor.
    """
    try:
        return _entries(read_pickle(content, _NAMES))
    except PickleError as error:
        raise type(error)(f"its index: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PickleError("its index is none of torch.distributed.checkpoint") from None


def _entries(value: Any) -> dict[str, Entry]:
    metadata = _fields(value, _HERE + "Metadata")
    tensors = _table(metadata["state_dict_metadata"])
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for key, place in _table(metadata["storage_data"]).items():
        index = _fields(key, _HERE + "MetadataIndex")
        name, offset = index["fqn"], index.get("offset")
        if type(name) is not str or name not in tensors:
            raise PickleError(f"it has a place for {printable(name, 80)}, which is no tensor")
        where = name, () if offset is None else _size(offset)
        if where in places:
            raise PickleError(f"{printable(name, 80)} has a part twice")
        places[where] = place
    entries = {name: _entry(name, tensor, places) for name, tensor in tensors.items()}
    if len(places) != sum(len(entry.chunks) for entry in entries.values()):
        raise PickleError("it has places for parts that no tensor has")
    return entries


def _entry(name: Any, value: Any, places: dict[tuple[str, tuple[int, ...]], Any]) -> Entry:
    if type(name) is not str or plain_problem(name):
        raise PickleError(f"{printable(name, 80)!r} is no name of a tensor")
    if type(value) is not Record or value.kind != _HERE + "TensorStorageMetadata":
        raise PickleError(f"{name} is not a tensor")
    tensor = _fields(value, value.kind)
    kind = _state(tensor["properties"], _HERE + "TensorProperties", lambda s: s[0])
    dtype = _DTYPES.get(kind.text) if type(kind) is Name else None
    if dtype is None:
        raise PickleError(f"{name} is of a type that no run saves")
    shape = _size(tensor["size"])
    chunks = []
    for part in tensor["chunks"]:
        fields = _fields(part, _HERE + "ChunkStorageMetadata")
        offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
        if sizes[1:] != shape[1:] or any(offsets[1:]) or len(sizes) != len(shape):
            raise PickleError(f"{name} has a part of another shape")
        first, rows = (offsets[0], sizes[0]) if shape else (0, 1)
        chunks.append(_chunk(name, first, rows, places.get((name, offsets))))
        needed = rows * math.prod(shape[1:]) * dtype.itemsize
        if not needed <= chunks[-1].length <= needed + _AROUND:
            raise PickleError(f"{name} has not as many numbers in its file as its shape says")
    chunks.sort()
    ends = [0, *(chunk.first + chunk.rows for chunk in chunks)]
    if [chunk.first for chunk in chunks] != ends[:-1] or ends[-1] != (shape[0] if shape else 1):
        raise PickleError(f"{name} is not whole: parts of it are missing or there twice")
    return Entry(dtype, shape, tuple(chunks))


def _chunk(name: str, first: int, rows: int, place: Any) -> Chunk:
    if place is None:
        raise PickleError(f"{name} has a part without a place")
    fields = _fields(place, _PLACE)
    file, offset, length = fields["relative_path"], fields["offset"], fields["length"]
    if type(file) is not str or plain_problem(file):
        raise PickleError(f"{name} lies in {printable(file, 80)!r}, which is no name of a file")
    if not are_counts((offset, length)) or fields.get("transform_descriptors"):
        raise PickleError(f"{name} has a part without a usable place")
    return Chunk(first, rows, file, offset, length)


def _fields(value: Any, kind: str) -> dict[Any, Any]:
    return _state(value, kind, _table)


def _state(value: Any, kind: str, reading: Callable[[Any], Any]) -> Any:
    if type(value) is not Record or value.kind != kind or value.args:
        raise TypeError
    return reading(value.state)


def _table(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise TypeError
    return value


def _size(value: Any) -> tuple[int, ...]:
    if type(value) is not Record or value.kind != "torch Size" or value.state is not None:
        raise TypeError
    (sizes,) = value.args
    if not is_shape(sizes):
        raise PickleError("it has a tensor of a size that none can have")
    return cast(tuple[int, ...], sizes)
