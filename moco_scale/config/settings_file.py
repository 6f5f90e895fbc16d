"""``--config FILE``: settings by the names of flags, which flags of the command line go before."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moco_scale.config.options import options_of, out_of_range
from moco_scale.untrusted.settings_file import WHAT, read_settings_file
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

FLAG = "--config"
_BESIDE = ("data_fingerprint",)
"""What a run writes into config.json beside its settings."""
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # which YAML takes for a text

_SHOWN = 20  # lines of what is wrong with a file


def add_flag(parser: argparse.ArgumentParser, *options: type) -> None:
    """Add ``--config``.

    Args:
        parser: has or gets the flags that a file may name.
        options: dataclasses that know the ranges of these.
    """
    parser.add_argument(
        FLAG,
        action=_File,
        options=options,
        metavar="FILE",
        help="settings by the names of these flags, as in a run's config.json; .json, .toml or "
        ".yaml; flags go before it",
    )


class _File(argparse.Action):
    """Action that keeps the name of the file, which has been read before."""

    def __init__(self, *, options: tuple[type, ...], **keywords: Any) -> None:
        super().__init__(**keywords)
        self.options = options

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, *__: Any) -> None:
        setattr(namespace, self.dest, value)


def take(parser: argparse.ArgumentParser, words: Sequence[str], older: Mapping[str, str]) -> None:
    """Make what the file of ``--config`` says the defaults of a parser, where one is given.

    Args:
        parser: of the command line.
        words: of the command line.
        older: names of other programs' flags, and what to say of them.

    Raises:
        UserError: Names all that is wrong with the file.
    """
    action = parser._option_string_actions.get(FLAG)
    if not isinstance(action, _File):
        return
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument(FLAG)
    try:
        path = first.parse_known_args(words)[0].config
    except argparse.ArgumentError:
        return  # which the parser itself will say
    if path is None:
        return
    given, wrong = read_settings_file(path)
    values, known = {}, _settings(parser)
    for name, value in given.items():
        if name in _BESIDE:
            continue
        if name not in known:
            wrong.append(f"{name} is unknown{_hint(name, known, older)}")
            continue
        dest = known[name].dest
        if dest in values:
            wrong.append(f"{name} and {dest} are one setting; keep one")
        try:
            values[dest] = _value(known[name], value)
        except ValueError as error:
            wrong.append(f"{name} {printable(repr(value), 60)}: {error}")
    for cls in action.options:
        mine = {f.name: values[f.name] for f in options_of(cls) if f.name in values}
        for line in out_of_range(cls(**mine)):
            flag, _, what = line.partition(" ")
            wrong.append(f"{_name(flag)} {what}")
    if wrong:
        if len(wrong) > _SHOWN:
            wrong[_SHOWN:] = [f"{len(wrong) - _SHOWN} more"]
        start = f"{WHAT} {printable(path)}:"
        raise UserError(f"{start} {wrong[0]}" if len(wrong) == 1 else "\n  ".join([start, *wrong]))
    parser.set_defaults(**values)
    for each in known.values():
        each.required = each.required and each.dest not in values


def _settings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Collect the flags that a file may name, by name with underscores."""
    return {
        _name(flag): action
        for action in parser._actions
        if action.help != argparse.SUPPRESS and action.dest not in ("help", "config")
        for flag in action.option_strings
        if flag.startswith("--") and not (action.nargs == 0 and flag.startswith("--no-"))
    }


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _hint(name: str, known: Mapping[str, Any], older: Mapping[str, str]) -> str:
    flag = "--" + name.replace("_", "-")
    if flag in older:
        return f"; it is here: {older[flag]}"
    close = difflib.get_close_matches(name, known, 1)
    return f"; {close[0]} is meant?" if close else "; remove it"


def _value(action: argparse.Action, value: Any) -> Any:
    """Convert a value as the flag would; ValueError where it takes no such value."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if action.nargs is not None:
        several = value if isinstance(value, list) else [value]
        try:
            return [_of_one(action, each) for each in several]
        except ValueError as error:
            raise ValueError(f"each {error}") from None
    return _of_one(action, value)


def _of_one(action: argparse.Action, value: Any) -> Any:
    kind: Any = action.type or str
    example = kind("1") if action.nargs is None else 1
    must = "a whole number" if isinstance(example, int) else "a number"
    if not isinstance(example, int | float):
        must = "a text, in quotes"
    if action.choices is not None:
        must = f"one of {', '.join(map(str, action.choices))}"
        must += ", in quotes" if isinstance(value, bool) else ""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    written = isinstance(value, str) and (value.isalpha() or _EXPONENT.fullmatch(value))
    if not (numeric or written if isinstance(example, int | float) else isinstance(value, str)):
        raise ValueError(f"must be {must}")
    try:
        made = kind(str(value))
    except argparse.ArgumentTypeError as error:  # out of its range
        raise ValueError(str(error)) from None
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"must be {must}") from None
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"must be {must}")
    return made
