"""Foreign text (names, messages of servers, values of files) made printable."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

SHOWN = 200
"""Characters of a foreign text that a message shows."""


def printable(value: object, limit: int = SHOWN) -> str:
    r"""Return foreign text as one line that any terminal, log and UTF-8 file can hold.

    Characters that do not print become escapes: ``\x1b``, ``\n``, ``\u2028``; a byte that is not
    UTF-8 (a surrogate of ``surrogateescape``) becomes ``\xe9``. Ordinary text is unchanged.

    Args:
        value: text, bytes (read as UTF-8), or anything with a ``str``.
        limit: characters of the result at most; a cut is marked by an ellipsis.
    """
    if isinstance(value, bytes):
        text = value[: 4 * limit].decode("utf-8", "surrogateescape")
    else:
        text = str(value)
    # Escapes only lengthen, so what stands beyond the limit is never shown.
    shown = "".join(map(_escaped, text[: limit + 1]))
    return shown if len(shown) <= limit else shown[: max(0, limit - 1)] + "…"


def printable_path(path: object) -> str:
    """Return a path as printable text, uncut."""
    return printable(path, 4096)


def some_of(things: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """Join the first of several things, with the number of the others."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return between.join(things[:most]) + more


def printable_lines(value: object, limit: int = 4000) -> str:
    """Return a text of several lines as printable text; its line feeds stay."""
    text = str(value)[: limit + 1]
    shown = "\n".join(printable(line, limit) for line in text.split("\n"))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def text_of(content: bytes, errors: str = "strict") -> str:
    """Decode a foreign small file: UTF-8, or UTF-16 with a mark, as Windows' shells write it.

    Raises:
        UnicodeDecodeError: It is no text.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig", errors)


def _escaped(character: str) -> str:
    if character.isprintable():  # no control, direction mark, separator of lines, surrogate
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that surrogateescape let through
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
