"""Saved scan of a remote tar."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moco_scale.untrusted.documents import Document
from moco_scale.untrusted.limits import SHARD_BYTES
from moco_scale.untrusted.shard_index import Checksum

FORMAT = 5
_Size = Annotated[int, Field(ge=0, le=SHARD_BYTES)]


class SavedScanText(Document):
    """Saved scan without its columns, and the state of the tar when it was fetched."""

    format: Literal[5]
    bytes: _Size
    checksum: Checksum
    state: Annotated[tuple[_Size | None, str, str], Field(strict=False)]  # JSON has lists
    names: list[str]
    without_image: Annotated[int, Field(ge=0)]
    odd: str
    dotted: str
    part: str
