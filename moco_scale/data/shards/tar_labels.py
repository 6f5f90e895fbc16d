"""Labels of samples, and labels of a set that cannot be used.

Pretraining needs no labels, so an odd label does not refuse the images: the set is then unlabelled,
and the first odd label is kept for the message.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moco_scale.untrusted.limits import CLASSES, LABEL_CHARACTERS, LABEL_JSON, LABEL_TEXT
from moco_scale.utils.text import printable, text_of

LABEL_SUFFIXES = ("cls", "json")
"""Suffixes of members that may hold a label, in the order of preference."""
LABEL_FIELDS = ("label", "cls", "class")  # of a .json, in the order of preference
_NUMBER = re.compile(r"([+-]?)0*([0-9]+?)(\.0*)?")
_HIGHEST = 2**31 - 1
_SHOWN = 60


class OddLabel(Exception):
    """Label that is no class; str() is the reason, to follow the name of its member."""


class TarLabels:
    """Labels of one tar, image by image."""

    def __init__(self) -> None:
        self.odd = ""
        """Description of the first odd one, printable."""
        self._values = array("q")  # of each image, a number or a place in _names; -1: none
        self._names: dict[str, int] = {}
        self._first: dict[type, str] = {}  # a member with a number, one with a name

    def __len__(self) -> int:
        return len(self._values)

    def add_none(self) -> None:
        """Add an image, without a label so far."""
        self._values.append(-1)

    def read(
        self, image: int, member: str, suffix: str, content: Callable[[int], bytes | None]
    ) -> None:
        """Read the label of an image; after an odd one, no more are read.

        Args:
            image: its number.
            member: name of the label's member.
            suffix: which of LABEL_SUFFIXES it is.
            content: from the most bytes it may have to its bytes, None where there are more.
        """
        if self.odd:
            return
        try:
            text = content(LABEL_JSON if suffix == "json" else LABEL_TEXT)
            if text is None:
                raise OddLabel("which is too large for a label")
            label = _json_label(text) if suffix == "json" else _text_label(text)
            if label == -1:
                return
            if type(label) not in self._first:
                first = f"{printable(repr(label), _SHOWN)} in {printable(member)}"
                self._first[type(label)] = first
                if len(self._first) == 2:
                    self.odd = (
                        f"labels that are numbers, {self._first[int]}, and others that are names, "
                        f"{self._first[str]}"
                    )
            if isinstance(label, str):
                label = self._names.setdefault(label, len(self._names))
                if label >= CLASSES:
                    raise OddLabel(f"the name of one more than {CLASSES:,} classes")
            self._values[image] = label
        except OddLabel as error:
            self.odd = f"{printable(member)}, {error}"

    def numbered(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Return class numbers without names, or numbers of sorted names and these.

        -1 means no label.
        """
        if self.odd:
            return np.full(len(self._values), -1, dtype=np.int64), []
        values, names = np.array(self._values, dtype=np.int64), sorted(self._names)
        if names:
            place = np.full(len(names) + 1, -1, dtype=np.int64)  # the last one is that of -1
            for number, name in enumerate(names):
                place[self._names[name]] = number
            values = place[values]
        return values, names


def _text_label(content: bytes) -> int | str:
    half = len(content) // 2
    if len(content) in (4, 8) and content[half:] in (bytes(half), b"\xff" * half):
        # A number as some programs keep it in memory: 32 or 64 bits, the lowest byte first.
        return _class(int.from_bytes(content, "little", signed=True))
    return _class(_decoded(content))


def _json_label(content: bytes) -> int | str:
    # Not by the strict parser: captions that were cut inside a character and NaN are common beside
    # images, and one field is asked for.
    try:
        fields = json.loads(_decoded(content))
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise OddLabel(f"which is not JSON ({why})") from None
    if isinstance(fields, dict):
        for field in LABEL_FIELDS:
            if fields.get(field) is not None:
                return _class(fields[field])
    return -1


def _decoded(content: bytes) -> str:
    try:
        return text_of(content)
    except UnicodeDecodeError as error:
        raise OddLabel(f"which is not text ({error.reason})") from None


def _class(value: Any) -> int | str:
    """Parse a class number, or a name; numbers below 0 are -1, no label."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise OddLabel("whose label is empty")
        number = _NUMBER.fullmatch(text)
        if number is None:
            return _name(text)
        sign, digits, _ = number.groups()
        value = -1 if sign == "-" and digits != "0" else int(digits[:10])
        if len(digits) > 10 and value >= 0:
            value = text
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value > _HIGHEST:
        raise OddLabel(f"whose label {_shown(value)} is no class")
    return max(value, -1)


def _name(text: str) -> str:
    """Normalise a class's name: names that look the same are one class, however composed."""
    if "\0" in text:
        raise OddLabel("which is not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OddLabel(f"whose label {_shown(text)} is not text") from None
    name = unicodedata.normalize("NFC", text)
    if len(name) > LABEL_CHARACTERS:
        raise OddLabel(f"whose label has {len(name):,} characters and is no name of a class")
    return name


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 1 << 64:  # a text of thousands of digits is refused
        return f"of {value.bit_length()} bits"
    text = value if isinstance(value, str) and value.isdigit() else repr(value)
    return printable(text, _SHOWN)
