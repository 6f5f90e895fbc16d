"""Files of ``torch.save``: plain values and tensors, each checked before memory is allocated.

Such a file is a zip of uncompressed records: a pickle, which lists the content, and the numbers of
each tensor as in memory. Nothing is unpickled, see ``pickles``; a tensor's numbers are read on
request, and never more than the file holds.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moco_scale.untrusted.documents import without_waiting
from moco_scale.untrusted.limits import PICKLE, SHARD_BYTES, TENSOR_FILE_DIRECTORY
from moco_scale.untrusted.pickles import (
    ORDERED_DICT,
    PERSISTENT,
    ForeignError,
    Name,
    PickleError,
    Plain,
    Record,
    read_pickle,
)

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch BFloat16Storage": torch.bfloat16,
    "torch HalfStorage": torch.float16,
    "torch LongStorage": torch.int64,
    "torch ByteStorage": torch.uint8,
}
DTYPES = frozenset(_STORAGES.values())
"""Types of tensors that a run saves; others are refused."""
_REBUILD = "torch._utils _rebuild_tensor_v2"
_NAMES = frozenset({_REBUILD, ORDERED_DICT, *_STORAGES})
# Of torch before 1.6: pickles one after the other.
_BARE_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_UNREADABLE = (
    *(zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError),
    *(EOFError, KeyError, RuntimeError),
)


@dataclass(frozen=True)
class StoredTensor:
    """Tensor of a file, not yet read.

    Attributes:
        dtype: one of :data:`DTYPES`.
        shape: as usual.
        strides: of a dense layout: without gaps and overlaps.
        first: index of the first element in its record.
        record: name of the record.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    record: str

    @property
    def described(self) -> str:
        """Type and shape, for people."""
        return describe(self.dtype, self.shape)


def describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Describe type and shape of a tensor: ``float32 [2, 3]``."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class TensorFile:
    """File of ``torch.save``, or a section of a file, open for reading.

    Args:
        path: of the file.
        start: first byte of the section.
        size: bytes of the section; None: to the end of the file.

    Attributes:
        content: plain values and :class:`StoredTensor`.

    Raises:
        ForeignError: It holds what would run code if torch read it.
        PickleError: It is damaged, or not of ``torch.save``.
        OSError: It cannot be read.
    """

    content: Plain

    def __init__(self, path: Path, start: int = 0, size: int | None = None) -> None:
        self._file = _Part(path, start, size)
        try:
            self._records, prefix = _records(self._file)
            self._prefix = prefix + "/data/"
            content = self._bytes(prefix + "/data.pkl", PICKLE)
            order = prefix + "/byteorder"
            if order in self._records and self._bytes(order, 16) != b"little":
                raise PickleError("its numbers have another byte order")
            self.content = self._value(read_pickle(bytes(content), _NAMES))
        except _UNREADABLE:
            bare = self._file.starts_with(_BARE_PICKLE)
            self._file.close()
            if bare:
                raise ForeignError(
                    "it has the form of torch before 1.6, a bare pickle; nothing was run"
                ) from None
            raise PickleError("it is damaged or no file of torch.save") from None
        except BaseException:
            self._file.close()
            raise

    def read(self, tensor: StoredTensor) -> Tensor:
        """Read a tensor of this file; contiguous, on the CPU.

        Raises:
            PickleError: Its numbers are not what was written.
            OSError: They cannot be read.
        """
        try:
            content = self._bytes(tensor.record)
        except _UNREADABLE:
            raise PickleError("it is damaged") from None
        if not content:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = torch.frombuffer(content, dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.strides, tensor.first).contiguous()

    def read_all(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Read several tensors, which together take no more memory than the file has.

        Raises:
            PickleError: They share numbers, or as in :meth:`read`.
            OSError: They cannot be read.
        """
        needed = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
        if needed > self._file.size:
            raise PickleError("its tensors are larger than the file")
        return {name: self.read(tensor) for name, tensor in tensors.items()}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _bytes(self, name: str, limit: int | None = None) -> bytearray:
        """Read a record and compare it with its checksum."""
        record = self._records[name]
        if limit is not None and record.file_size > limit:
            raise PickleError(f"its {name.rpartition('/')[2]} has more than {limit:,} bytes")
        self._file.seek(record.header_offset)
        header = self._file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError
        name_size, extra = struct.unpack("<HH", header[26:30])
        content = self._file.exactly(
            record.header_offset + 30 + name_size + extra, record.file_size
        )
        if zlib.crc32(content) != record.CRC:
            raise PickleError("its content is not what was written")
        return content

    def _value(self, value: Plain) -> Plain:
        """Convert calls that would make tensors to StoredTensor."""
        if type(value) is dict:
            return {self._value(key): self._value(each) for key, each in value.items()}
        if type(value) is list:
            return [self._value(each) for each in value]
        if type(value) is tuple:
            return tuple(map(self._value, value))
        if type(value) is Record:
            return self._tensor(value)
        if type(value) is Name:
            raise ForeignError(f"it holds {value.text.replace(' ', '.')} itself; nothing was run")
        return value

    def _tensor(self, record: Record) -> StoredTensor:
        if record.kind != _REBUILD or record.state is not None or len(record.args) != 6:
            raise ForeignError("it holds more than plain values and tensors; nothing was run")
        storage, first, shape, strides, _, _ = record.args
        parts: tuple[Any, ...] = storage.args if _is_storage(storage) else (None,) * 5
        tag, kind, key, _, count = parts
        if tag != "storage" or type(kind) is not Name or type(key) is not str:
            raise ForeignError("it holds a tensor of another kind; nothing was run")
        dtype = _STORAGES[kind.text]
        name = self._prefix + key
        if not (is_shape(shape) and are_counts(strides) and are_counts((first, count))):
            raise PickleError("it holds a tensor without a shape")
        numbers = math.prod(shape)
        if self._records[name].file_size != count * dtype.itemsize:
            raise PickleError("it holds a tensor whose numbers are not in the file")
        if not _is_dense(shape, strides) or first + numbers > count:
            raise PickleError(
                f"it holds a tensor {describe(dtype, shape)} of only {count:,} numbers, or in a "
                "layout that no run saves"
            )
        return StoredTensor(dtype, shape, strides, first, name)


def _is_storage(value: Plain) -> bool:
    return (
        type(value) is Record
        and value.kind == PERSISTENT
        and type(value.args) is tuple
        and len(value.args) == 5
    )


def are_counts(values: Any) -> bool:
    """Tell whether a value from outside is a tuple of numbers that torch can compute with."""
    return (
        type(values) is tuple
        and len(values) <= 16
        and all(type(each) is int and 0 <= each < SHARD_BYTES for each in values)
    )


def is_shape(value: Any) -> bool:
    """Tell whether a value from outside is the shape of a tensor that a machine could hold."""
    return are_counts(value) and math.prod(each or 1 for each in value) < SHARD_BYTES


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether the elements have no gaps and overlaps, in any order of the dimensions."""
    if len(shape) != len(strides):
        return False
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _records(file: _Part) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """List the records of a zip by name, and the folder of all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = zipfile.ZipFile(file).infolist()
    records = {record.filename: record for record in listed}
    prefixes = {name.partition("/")[0] for name in records}
    if len(records) != len(listed) or len(prefixes) != 1:
        raise PickleError("it has records that torch.save does not write")
    total = 0
    for record in listed:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise PickleError("its records are compressed, which torch.save never does")
        total += record.file_size
    if total > file.size:
        raise PickleError("its records are larger than the file")
    return records, prefixes.pop()


class _Part(io.RawIOBase):
    """Section of a file as a file of its own."""

    def __init__(self, path: Path, start: int, size: int | None) -> None:
        super().__init__()
        self._whole = open(path, "rb", 0, opener=without_waiting)  # noqa: SIM115
        there = self._whole.seek(0, io.SEEK_END)
        self._start = start
        self.size = there - start if size is None else size
        self._at = 0
        if start < 0 or self.size < 0 or start + self.size > there:
            self.close()
            raise PickleError("it ends before its content does")

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + place < 0:
            raise ValueError("a place before the file")
        self._at = base + place
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read for the zip's directory: never much, whatever size the file claims."""
        left = max(self.size - self._at, 0)
        wanted = left if size < 0 else min(size, left)
        if wanted > TENSOR_FILE_DIRECTORY:
            raise PickleError("its list of records is larger than any")
        content = bytes(self.exactly(self._at, wanted))
        self._at += wanted
        return content

    def exactly(self, place: int, size: int) -> bytearray:
        """Read so many bytes at a place, after checking that they exist."""
        if place < 0 or size < 0 or place + size > self.size:
            raise ValueError("beyond the end")
        content = bytearray(size)
        view, done = memoryview(content), 0
        self._whole.seek(self._start + place)
        while done < size:
            count = self._whole.readinto(view[done:])
            if not count:
                raise ValueError("the file has become shorter")
            done += count
        return content

    def starts_with(self, content: bytes) -> bool:
        return self.size >= len(content) and self.exactly(0, len(content)) == content

    def close(self) -> None:
        self._whole.close()
        super().close()
