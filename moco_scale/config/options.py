"""Options as fields of frozen dataclasses, from which flags, help and checks are made."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moco_scale.config.flag_types import number, whole_number, whole_numbers
from moco_scale.utils.errors import UserError


@dataclass(frozen=True)
class Range:
    """Range of an option's numbers.

    Attributes:
        words: message about other numbers.
        least: the smallest.
        most: the largest.
        above: exclude the smallest itself.
    """

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def advising(self, advice: str) -> Range:
        """Return the range with advice in its message."""
        return dataclasses.replace(self, words=f"{self.words}; {advice}")


POSITIVE = Range("must be greater than 0", 0, above=True)
NOT_NEGATIVE = Range("must not be negative", 0)
UNIT = Range("must lie between 0 and 1", 0, 1)
SHARE = Range("must be a share above 0 and at most 1", 0, 1, above=True)


def at_least(least: float) -> Range:
    """Make the range of numbers from one on."""
    return Range(f"must be at least {least:g}", least)


def option(default: Any, text: str, *, within: Range | None = None, **more: Any) -> Any:
    """Make a field that has a flag.

    Args:
        default: value without the flag; never out of range, so that 0 may have a special meaning.
        text: for ``--help``.
        within: range of its values.
        more: ``flag``, where it differs from the field's name, and its ``aliases``; ``type``, where
            the default is None; ``switch`` for a bool without its opposite; ``choices``,
            ``metavar`` and ``required`` as in argparse.
    """
    return dataclasses.field(default=default, metadata={"help": text, "within": within, **more})


def options_of(cls: Any) -> list[dataclasses.Field[Any]]:
    """List fields of a dataclass, or of an instance, that have a flag."""
    return [field for field in fields(cls) if "help" in field.metadata]


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Name the flag of an option: the field's name, unless another is given."""
    return str(field.metadata.get("flag") or "--" + field.name.replace("_", "-"))


def add_flags(parser: Any, cls: type, unsaid: Container[str] = ()) -> None:
    """Add the flags of a dataclass to a parser or a group; a flag not given is None.

    Args:
        parser: or group.
        cls: the dataclass.
        unsaid: options whose default is found elsewhere, as in a recipe.
    """
    for field in options_of(cls):
        _add_flag(parser, field, "" if field.name in unsaid else _default_of(field))


def _add_flag(parser: Any, field: dataclasses.Field[Any], default: str) -> None:
    meta, kind = field.metadata, type(field.default)
    keywords: dict[str, Any] = {"dest": field.name, "default": None}
    keywords["help"] = meta["help"].replace("%", "%%") + default
    if kind is bool:
        keywords["action"] = "store_true" if "switch" in meta else argparse.BooleanOptionalAction
    elif kind is tuple:
        keywords |= {"nargs": "+", "type": whole_numbers, "metavar": "N"}
    else:
        keywords["type"] = meta.get("type", {int: whole_number, float: number}.get(kind, kind))
        keywords["choices"] = meta.get("choices")
        keywords["required"] = meta.get("required", False)
        named = None if keywords["choices"] else kind.__name__.upper()
        keywords["metavar"] = meta.get("metavar", named)
    parser.add_argument(flag_of(field), *meta.get("aliases", ()), **keywords)


def _default_of(field: dataclasses.Field[Any]) -> str:
    """Describe a flag's default for its help, unless the help has it already."""
    text, default = field.metadata["help"], field.default
    if default in (None, "", ()) or "default" in text or "switch" in field.metadata:
        return ""
    if isinstance(default, bool):
        return f" (default: {'yes' if default else 'no'})"
    if isinstance(default, tuple):
        return f" (default: {','.join(map(str, default))})"
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"


def given(args: Mapping[str, Any], *classes: type) -> dict[str, Any]:
    """Collect values that a command line gives to options of some dataclasses, by name."""
    values = {}
    for field in (field for cls in classes for field in options_of(cls)):
        if (value := args[field.name]) is not None:
            lists = isinstance(field.default, tuple)
            values[field.name] = tuple(n for part in value for n in part) if lists else value
    return values


def out_of_range(*options: object) -> list[str]:
    """Describe each number of some dataclasses that is out of its range."""
    wrong = []
    for one in options:
        for field in options_of(one):
            value, within = getattr(one, field.name), field.metadata["within"]
            if isinstance(value, float) and not math.isfinite(value):
                wrong.append(f"{flag_of(field)} {value}: must be a finite number")
            elif within is not None and value != field.default and value not in within:
                wrong.append(f"{flag_of(field)} {value}: {within.words}")
    return wrong


def refuse(wrong: list[str]) -> None:
    """Raise a UserError with these lines, if there are any."""
    if wrong:
        raise UserError("\n  ".join(wrong if len(wrong) == 1 else ["these cannot be:", *wrong]))
