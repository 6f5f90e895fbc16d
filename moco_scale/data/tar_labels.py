"""What the label of a sample is, and when the labels of a set cannot be used.

Pretraining needs no labels, so an odd one refuses nobody's pictures: the set is then an unlabelled
one, and which label was the first odd one is kept to be said.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from moco_scale.untrusted.limits import LABEL_CHARACTERS
from moco_scale.untrusted.shard_index import written

LABEL_FIELDS = ("label", "cls", "class")  # of a .json, in the order of preference
_NUMBER = re.compile(r"[+-]?\d{1,4000}(\.0*)?")


class OddLabel(Exception):
    """A label that is no class; str() says of which member, after "the tar holds"."""


class TarLabels:
    """The labels of one tar, sample by sample."""

    def __init__(self) -> None:
        self.odd = ""
        """What is odd about the first odd one."""
        self._labels: list[int | str] = []
        self._first: dict[type, str] = {}  # a member with a number, one with a name

    def add(self, member: str, text: bytes | None) -> None:
        """The label of the next picture.

        member: the `.cls` or `.json` that has it. text: what is in it; None: there is no such
        member, or it is too large for a label.
        """
        label: int | str = -1
        try:
            if member and text is None:
                raise OddLabel(f"{member}, which is too large for a label")
            if member:
                label = _label(member, text or b"")
        except OddLabel as error:
            self.odd = self.odd or str(error)
        if label != -1:
            self._first.setdefault(type(label), f"{label!r:.60} in {member}")
        self._labels.append(label)

    def numbered(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Class numbers and no names, or places in the sorted names and these; -1: none."""
        if len(self._first) == 2:
            self.odd = self.odd or (
                f"labels that are numbers, {self._first[int]}, and others that are names, "
                f"{self._first[str]}"
            )
        if self.odd:
            return np.full(len(self._labels), -1, dtype=np.int64), []
        names = sorted({label for label in self._labels if isinstance(label, str)})
        place = {name: i for i, name in enumerate(names)}
        numbers = [place[label] if isinstance(label, str) else label for label in self._labels]
        return np.array(numbers, dtype=np.int64), names


def _label(member: str, content: bytes) -> int | str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise OddLabel(f"{member}, which is not text ({error.reason})") from None
    if not member.lower().endswith(".json"):
        return _class(member, text)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OddLabel(f"{member}, which is not JSON ({error})") from None
    if isinstance(fields, dict):
        for field in LABEL_FIELDS:
            if fields.get(field) is not None:
                return _class(member, fields[field])
    return -1


def _class(member: str, value: Any) -> int | str:
    """A class number, or a name; numbers below 0 are -1, which means none."""
    if isinstance(value, str) and value.strip():
        value = value.strip()
        if not _NUMBER.fullmatch(value):
            if len(value) > LABEL_CHARACTERS or value != written(value):
                raise OddLabel(f"{member}, whose label is too long or not text")
            return value
        value = int(value.partition(".")[0])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        raise OddLabel(f"{member}, whose label is empty")
    if isinstance(value, bool) or not isinstance(value, int) or value >= 2**31:
        raise OddLabel(f"{member}, whose label {value!r:.60} is no class")
    return max(value, -1)
