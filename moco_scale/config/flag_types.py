"""Types of flags for argparse, with their names in its messages."""

from __future__ import annotations

import argparse
from pathlib import Path


class DefaultsHelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, unless the help has it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or default in (None, "", False, argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: {'yes' if default is True else '%(default)s'})"


def whole_number(text: str) -> int:
    """Parse a whole number."""
    return int(text)


def number(text: str) -> float:
    """Parse a number."""
    return float(text)


def positive_int(text: str) -> int:
    """Parse a whole number from 1 on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def not_negative_int(text: str) -> int:
    """Parse a whole number from 0 on."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def whole_numbers(text: str) -> list[int]:
    """Parse whole numbers from 1 on, separated by commas: ``120,160``."""
    return [positive_int(part) for part in text.split(",") if part]


def named_path(text: str) -> Path:
    """Parse a path; an empty one, perhaps of an unset variable, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


# What argparse calls a type in "invalid ... value: 'x'".
whole_number.__name__ = positive_int.__name__ = not_negative_int.__name__ = "whole number"
whole_numbers.__name__ = "whole number, or list of them,"
