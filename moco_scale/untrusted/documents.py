"""JSON from outside, converted to values of a schema or refused by name."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
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
    """Base of every schema: strict types, finite numbers, immutable.

    Keys that a schema lacks are dropped: a later version may write more.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class DocumentError(UserError):
    """Document that is too large, no JSON, or does not fit its schema; has all problems."""


D = TypeVar("D", bound=Document)


def parse_json(content: bytes, what: str) -> Any:
    """Parse JSON of any shape.

    Args:
        content: UTF-8; a byte-order mark is skipped.
        what: names the document in messages, with its place.

    Raises:
        DocumentError: It is no JSON, is nested too deeply (200 levels), holds NaN or Infinity, or
            has more than a million lists and objects.
    """
    if content.count(b"[") + content.count(b"{") > CONTAINERS:
        raise DocumentError(f"{what} has more than {CONTAINERS:,} lists and objects")
    try:
        return from_json(content.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise DocumentError(f"{what} is not valid JSON: {printable(error)}") from None


def said_twice(content: bytes) -> list[str]:
    """Names that an object of a JSON document has more than once.

    content: has been parsed by :func:`parse_json`, which bounds the depth.
    """
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(name for name, _ in pairs)
        twice.extend(name for name, count in counts.items() if count > 1)

    json.loads(content.decode("utf-8-sig"), object_pairs_hook=note)
    return list(dict.fromkeys(twice))


def parse_document(content: bytes, schema: type[D], what: str) -> D:
    """Parse JSON of a schema.

    Raises:
        DocumentError: As :func:`parse_json`, or it does not fit the schema; the message has the
            place.
    """
    return check(parse_json(content, what), schema, what)


def check(value: Any, schema: type[D], what: str) -> D:
    """Convert plain values to those of a schema.

    Raises:
        DocumentError: They do not fit; the message has five places at most.
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
        DocumentError: It has more.
        OSError: It cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=without_waiting) as file:
        # One byte more shows that there is more; the size that a file claims may be another.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DocumentError(f"{what} {path} has more than {limit:,} bytes, which none needs")
    return content


def without_waiting(path: str, flags: int) -> int:
    """Open regular files only, without waiting for a pipe: an ``opener`` for :func:`open`.

    Raises:
        OSError: Also for a folder, a pipe or a device.
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
        DocumentError: It is missing, unreadable, or too large.
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
        DocumentError: It is missing, unreadable, too large, or no JSON.
    """
    return parse_json(read_named(path, limit, what), f"{what} {path}")


def read_document(path: str | Path, schema: type[D], limit: int, what: str) -> D:
    """Read a JSON file of a schema.

    Raises:
        DocumentError: As :func:`read_json`, or it does not fit the schema.
    """
    return check(read_json(path, limit, what), schema, f"{what} {path}")


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, each with its line feed but perhaps the last; only that ends one.

    A line of more than ``limits.LINE`` bytes comes in pieces.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=without_waiting) as file:
        while line := file.readline(LINE):
            yield line


def record_of(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line of JSON; None for a cut-off line, or other content.

    NaN stays NaN: a loss may have been logged so.
    """
    try:
        record = from_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def at_most(count: int) -> BeforeValidator:
    """Refuse a table of too many entries before looking at any."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > count:
            raise ValueError(f"has {len(value):,} entries; at most {count:,} are allowed")
        return value

    return BeforeValidator(check)
