"""Line of ``bad_samples.jsonl``, which a resumed run continues."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moco_scale.untrusted.documents import Document

NAME_CHARACTERS = 4096
"""Longest name of a shard or key in the list."""

_Number = Annotated[int, Field(ge=0, lt=2**63)]


class BadSampleLine(Document):
    """Image that could not be decoded, as far as a resumed run needs it."""

    sample: _Number
    shard: Annotated[str, Field(max_length=NAME_CHARACTERS)]
    step: _Number
