"""Names from outside, which become paths only inside their folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from moco_scale.untrusted.limits import NAME_BYTES
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_MADE_HERE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def component_problem(name: str) -> str | None:
    """Explain why a name is no single component of a path; None: it is one."""
    if not name or name in (".", ".."):
        return "is no name of a file"
    if "/" in name or "\0" in name:
        return "has a / or a zero byte"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    if len(encoded) > NAME_BYTES:
        return f"has more than {NAME_BYTES} bytes"
    return None


def relative_problem(name: str) -> str | None:
    """Explain why a name is no path below a folder (``a/b.tar``); None: it is one."""
    parts = name.split("/")
    if len(parts) > 32:
        return "has more than 32 folders"
    return next((problem for problem in map(component_problem, parts) if problem), None)


def plain_problem(name: str) -> str | None:
    """Explain why a name is none that this program would make; None: it is one."""
    if len(name) > NAME_BYTES or not _MADE_HERE.fullmatch(name):
        return "has more than letters, digits, dot, dash and underscore"
    return None


def without(problem_of: Callable[[str], str | None]) -> AfterValidator:
    """Make a schema's check from a function that finds a name's problem."""

    def check(name: str) -> str:
        if problem := problem_of(name):
            raise ValueError(f"{printable(name, 80)!r} {problem}")
        return name

    return AfterValidator(check)


RelativePath = Annotated[str, without(relative_problem)]
"""Schema type: components joined by ``/``, none of them ``..``, not absolute."""
PlainName = Annotated[str, without(plain_problem)]
"""Schema type: a name of the alphabet that this program itself uses."""


def inside(folder: Path, name: str, what: str) -> Path:
    """Return ``folder/name``, resolved, if it is inside the folder.

    Args:
        folder: that it must not leave, by ``..`` or by a link.
        name: relative path from outside.
        what: names it in the message.

    Raises:
        UserError: It would lie elsewhere.
    """
    problem = relative_problem(name)
    if problem is None:
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()):
            return path
        problem = "leads out of the folder"
    raise UserError(f"{what} {printable(name)!r} {problem}: it has to lie inside {folder}")
