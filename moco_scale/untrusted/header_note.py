"""``SPLIT-checked.json``: which tars were found right. It may come with the tars, from anybody."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moco_scale.untrusted.documents import Document

Nanoseconds = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class HeaderNote(Document):
    """What it holds.

    Attributes:
        index: checksum of the index that they were compared with.
        right: of each tar, the times of change at which it was right.
    """

    index: str
    right: list[list[Nanoseconds]]
