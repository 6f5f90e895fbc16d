"""JSON from outside, turned into values of a schema or refused by name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import from_json

from moco_scale.untrusted.limits import CONTAINERS, LINE
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_SHOWN_PROBLEMS = 5


class Document(BaseModel):
    """Base of every schema: values keep their type, numbers are finite, it cannot be changed.

    Keys that a schema does not name are dropped: a later version may write more.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class DocumentError(UserError):
    """A document that is too large, no JSON, or not what its schema says; names all of it."""


D = TypeVar("D", bound=Document)


def parse_json(content: bytes, what: str) -> Any:
    """Parse JSON of any shape.

    Args:
        content: UTF-8; a byte-order mark is passed over.
        what: names the document in messages, with its place.

    Raises:
        DocumentError: it is no JSON, is nested too deeply (200 levels), holds NaN or Infinity, or
            has more than a million lists and objects.
    """
    if content.count(b"[") + content.count(b"{") > CONTAINERS:
        raise DocumentError(f"{what} has more than {CONTAINERS:,} lists and objects")
    try:
        return from_json(content.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise DocumentError(f"{what} is not valid JSON: {printable(error)}") from None


def parse_document(content: bytes, schema: type[D], what: str) -> D:
    """Parse JSON of a schema.

    Raises:
        DocumentError: as :func:`parse_json`, or it does not fit the schema; says where.
    """
    return check(parse_json(content, what), schema, what)


def check(value: Any, schema: type[D], what: str) -> D:
    """Turn plain values into those of a schema.

    Raises:
        DocumentError: they do not fit; names each place, five at most.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        shown = [_problem(each) for each in found[:_SHOWN_PROBLEMS]]
        if len(found) > len(shown):
            shown.append(f"{len(found) - len(shown)} more")
        raise DocumentError(f"{what}: {'; '.join(shown)}") from None


def _problem(error: Any) -> str:
    place = ".".join(printable(part, 60) for part in error["loc"])
    text = printable(str(error["msg"]).removeprefix("Value error, "))
    return f"{place}: {text}" if place else text


def read_bounded(path: str | Path, limit: int, what: str) -> bytes:
    """Read a whole file of at most ``limit`` bytes.

    Raises:
        DocumentError: it has more.
        OSError: it cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=without_waiting) as file:
        # One byte more shows that there is more; the size that a file claims may be another.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DocumentError(f"{what} {path} has more than {limit:,} bytes, which none needs")
    return content


def without_waiting(path: str, flags: int) -> int:
    """An ``opener`` for :func:`open` that takes regular files alone; a pipe is not waited for.

    Raises:
        OSError: also where it is a folder, a pipe or a device.
    """
    file = os.open(path, flags | os.O_NONBLOCK)
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return file
    os.close(file)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "it is no regular file", path)


def read_named(path: str | Path, limit: int, what: str) -> bytes:
    """Read a whole file that a user has named.

    Raises:
        DocumentError: it is missing or unreadable, or too large.
    """
    try:
        return read_bounded(path, limit, what)
    except OSError as error:
        raise DocumentError(f"{what} {printable(path)}: {error.strerror or error}") from None
    except ValueError as error:  # a zero byte in the path
        raise DocumentError(f"{what} {printable(path)}: {error}") from None


def read_json(path: str | Path, limit: int, what: str) -> Any:
    """Read a JSON file of any shape.

    Raises:
        DocumentError: it is missing or unreadable, too large, or no JSON.
    """
    return parse_json(read_named(path, limit, what), f"{what} {path}")


def read_document(path: str | Path, schema: type[D], limit: int, what: str) -> D:
    """Read a JSON file of a schema.

    Raises:
        DocumentError: as :func:`read_json`, or it does not fit the schema.
    """
    return check(read_json(path, limit, what), schema, f"{what} {path}")


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, each with its line feed but perhaps the last; only that ends one.

    A line of more than ``limits.LINE`` bytes comes in pieces.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=without_waiting) as file:
        while line := file.readline(LINE):
            yield line


def record_of(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line of JSON; None for one that a kill has cut, or of other things.

    NaN stays what it is: a loss that was logged.
    """
    try:
        record = from_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def at_most(count: int) -> BeforeValidator:
    """Refuse a table of more entries before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > count:
            raise ValueError(f"has {len(value):,} entries; at most {count:,} are allowed")
        return value

    return BeforeValidator(check)
