"""Reads a struct array of plain numbers and texts out of a MATLAB 5 file, and nothing else.

Format: "MAT-File Format", The MathWorks, chapter 1 (Level 5 MAT-files). Only sizes and numbers are
interpreted, and how many bytes and elements there may be is limited, so a malicious file can at
worst be refused.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moco_scale.untrusted.limits import MAT_ELEMENTS, MAT_FILE, MAT_INFLATED

Value = int | float | str | None

_HEADER_BYTES = 128
_MOST_DIMENSIONS = 32
_MOST_FIELDS = 1024

# data types (table 1-1) that hold numbers, as struct format characters
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_MATRIX, _COMPRESSED = 14, 15
_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
# array classes (table 1-3)
_STRUCT_CLASS, _CHAR_CLASS = 2, 4
_NUMBER_CLASSES = range(6, 16)


class MatFileError(ValueError):
    """The file is not what it should be; the text says in what way."""


class _Element(NamedTuple):
    kind: int
    data: memoryview


class _Matrix(NamedTuple):
    """The head of an array: its class, shape and name, and the elements that follow."""

    array_class: int
    shape: tuple[int, ...]
    name: str
    rest: list[_Element]


def struct_array(content: bytes, name: str, fields: Sequence[str]) -> list[dict[str, Value]]:
    """The entries of the struct array called name, with the given fields only.

    Numeric fields of one element become int or float, char arrays become str, all else None.
    Raises MatFileError.
    """
    if len(content) > MAT_FILE:
        raise MatFileError(f"more than {MAT_FILE:,} bytes, which no such file has")
    if len(content) < _HEADER_BYTES or content[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise MatFileError("not a MATLAB 5 file")
    order = "<" if content[126:128] == b"IM" else ">"
    left = MAT_INFLATED
    try:
        for element in _elements(memoryview(content)[_HEADER_BYTES:], order):
            if element.kind == _COMPRESSED:
                plain = memoryview(_inflate(element.data, left))
                left -= len(plain)
                element = next(_elements(plain, order))
            if element.kind != _MATRIX:
                continue
            matrix = _matrix(element.data, order)
            if matrix.name == name and matrix.array_class == _STRUCT_CLASS:
                return _entries(matrix, fields, order)
    except MatFileError:
        raise
    except (struct.error, zlib.error, IndexError, StopIteration, ValueError) as error:
        raise MatFileError(f"damaged ({error or type(error).__name__})") from error
    raise MatFileError(f"no struct array {name!r} in it")


def _inflate(data: memoryview, most: int) -> bytes:
    decompressor = zlib.decompressobj()
    plain = decompressor.decompress(data, most + 1)  # 0 would mean all
    if len(plain) > most:
        raise MatFileError(f"variables of more than {MAT_INFLATED:,} bytes")
    if not decompressor.eof:
        raise MatFileError("a variable is cut off")
    return plain


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    """The data elements that follow one another in a stretch of bytes."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > MAT_ELEMENTS:
            raise MatFileError(f"more than {MAT_ELEMENTS:,} elements in one")
        (word,) = struct.unpack_from(f"{order}I", data, at)
        if word >> 16:  # small format: the size in the upper half, the data in the next 4 bytes
            size = word >> 16
            kind, start, after = word & 0xFFFF, at + 4, at + 8
            if size > 4:
                raise MatFileError("damaged (a small element of more than 4 bytes)")
        else:
            kind, size = struct.unpack_from(f"{order}2I", data, at)
            start = at + 8
            padding = 0 if kind == _COMPRESSED else -size % 8
            after = start + size + padding
        if start + size > len(data):
            raise MatFileError("damaged (an element reaches beyond the end)")
        yield _Element(kind, data[start : start + size])
        at = after


def _matrix(data: memoryview, order: str) -> _Matrix:
    """An array element: flags, shape, name, then what depends on its class."""
    flags, shape, name, *rest = _elements(data, order)
    (word,) = struct.unpack_from(f"{order}I", flags.data, 0)
    if len(shape.data) > 4 * _MOST_DIMENSIONS:
        raise MatFileError(f"an array of more than {_MOST_DIMENSIONS} dimensions")
    sizes = struct.unpack(f"{order}{len(shape.data) // 4}i", shape.data)
    return _Matrix(word & 0xFF, sizes, bytes(name.data).decode("latin-1"), rest)


def _entries(matrix: _Matrix, fields: Sequence[str], order: str) -> list[dict[str, Value]]:
    """The entries of a struct array: a field-name length, the names, then all values."""
    length_element, names_element, *values = matrix.rest
    (length,) = struct.unpack_from(f"{order}i", length_element.data, 0)
    raw = bytes(names_element.data)
    if length <= 0 or len(raw) > length * _MOST_FIELDS:
        raise MatFileError("damaged (field names of no length, or too many)")
    names = [
        raw[at : at + length].partition(b"\0")[0].decode("latin-1")
        for at in range(0, len(raw), length)
    ]
    missing = set(fields) - set(names)
    if missing:
        raise MatFileError(f"no field {sorted(missing)[0]!r} in {matrix.name!r}")
    count = math.prod(matrix.shape)
    if len(values) != count * len(names):
        raise MatFileError(f"damaged ({len(values)} values for {count} x {len(names)} fields)")
    columns = {field: names.index(field) for field in fields}
    return [
        {
            field: _value(values[entry * len(names) + column], order)
            for field, column in columns.items()
        }
        for entry in range(count)
    ]


def _value(element: _Element, order: str) -> Value:
    if element.kind != _MATRIX or not element.data:
        return None
    matrix = _matrix(element.data, order)
    if not matrix.rest:
        return None
    kind, data = matrix.rest[0]
    if matrix.array_class == _CHAR_CLASS and kind in _TEXT:
        encoding = _TEXT[kind]
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if order == "<" else "-be"
        return bytes(data).decode(encoding)
    if matrix.array_class in _NUMBER_CLASSES and math.prod(matrix.shape) == 1 and kind in _NUMBERS:
        number: int | float = struct.unpack_from(order + _NUMBERS[kind], data, 0)[0]
        return number
    return None
