"""A file of settings that a user names: JSON, TOML or YAML, turned into plain values by name."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moco_scale.untrusted.documents import DocumentError, parse_json, read_named, said_twice
from moco_scale.untrusted.limits import SETTINGS_BRACKETS, SETTINGS_FILE, STEPS
from moco_scale.utils.text import printable

WHAT = "settings file"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def read_settings_file(path: str) -> tuple[dict[str, Any], list[str]]:
    """Read settings by name: booleans, numbers and texts, and lists of these.

    Returns:
        The settings, and a line for each thing in the file that is none.

    Raises:
        DocumentError: The file is missing or unreadable, larger than it can be, or not what the
            end of its name says.
    """
    what = f"{WHAT} {printable(path)}"
    parse = _PARSERS.get(Path(path).suffix.lower())
    if parse is None:
        endings = ", ".join(_PARSERS)
        raise DocumentError(f"{what}: its name has to end in one of {endings}")
    content = read_named(path, SETTINGS_FILE, WHAT)
    if content.count(b"[") + content.count(b"{") > SETTINGS_BRACKETS:
        raise DocumentError(f"{what} has more than {SETTINGS_BRACKETS} brackets, which none needs")
    try:
        values, twice = parse(content, what)
    except (ValueError, RecursionError) as error:
        ending = Path(path).suffix.lower().removeprefix(".")
        raise DocumentError(f"{what} is not valid {ending}: {printable(error)}") from None
    if not isinstance(values, dict):
        raise DocumentError(f"{what}: must be settings by name")
    wrong = [f"{printable(name, 60)} stands there twice; keep one" for name in dict.fromkeys(twice)]
    settings = {}
    for name, value in values.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            wrong.append(f"{printable(name, 60)} is no name of a setting, such as batch_size")
        elif problem := _problem(value):
            wrong.append(f"{name} {problem}")
        else:
            settings[name] = value
    return settings, wrong


def _problem(value: Any) -> str | None:
    """Explain why a value is none of a setting; None: it is one."""
    if isinstance(value, list):
        return next((p for p in map(_problem_of_one, value) if p), None)
    return _problem_of_one(value)


def _problem_of_one(value: Any) -> str | None:
    if value is None:
        return "has no value; give one, or remove it"
    if not isinstance(value, bool | int | float | str):
        return f"is a {type(value).__name__}; settings are true, false, numbers, texts or lists"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and not -STEPS < value < STEPS:
        return "is no number that it can be"
    return None


def _json(content: bytes, what: str) -> tuple[Any, list[str]]:
    return parse_json(content, what), said_twice(content)


def _toml(content: bytes, what: str) -> tuple[Any, list[str]]:
    return tomllib.loads(content.decode("utf-8-sig")), []  # which refuses what is said twice


def _yaml(content: bytes, what: str) -> tuple[Any, list[str]]:
    # An alias makes a value out of one that stands elsewhere, and ten of ten of ten of them.
    others = (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken, yaml.DirectiveToken)
    try:
        for token in yaml.scan(content, yaml.SafeLoader):
            if isinstance(token, others):
                raise DocumentError(
                    f"{what} line {token.start_mark.line + 1}: anchors, aliases, tags and "
                    "directives are not read; write the value itself"
                )
        root = yaml.compose(content, yaml.SafeLoader)
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        names = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        return yaml.safe_load(content), [name for name in names if names.count(name) > 1]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


_PARSERS: dict[str, Callable[[bytes, str], tuple[Any, list[str]]]] = {
    ".json": _json,
    ".toml": _toml,
    ".yaml": _yaml,
    ".yml": _yaml,
}
"""By the end of a name: the value of a document, and names that it says twice."""
