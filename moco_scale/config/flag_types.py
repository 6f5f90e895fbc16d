"""What argparse makes of a word: numbers in a range, and what it says of them and of others."""

from __future__ import annotations

import argparse
import math


class DefaultsHelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, where there is one and the help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or default in (None, "", False, argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: {'yes' if default is True else '%(default)s'})"


def positive_int(text: str) -> int:
    """A whole number from 1 on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def not_negative_int(text: str) -> int:
    """A whole number from 0 on."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> float:
    """A finite number from 0 on."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is negative or no number")
    return value


def whole_numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas: ``120,160``."""
    return [positive_int(part) for part in text.split(",") if part]


# What argparse calls a type in "invalid ... value: 'x'".
positive_int.__name__ = not_negative_int.__name__ = "whole number"
positive.__name__ = not_negative.__name__ = "number"
whole_numbers.__name__ = "whole number, or list of them,"
