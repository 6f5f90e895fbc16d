"""Schemas of index.json of shards: of a set that was made or fetched, and of one scanned here.

The two have one format and are two documents. A foreign index only names files below a folder. An
index scanned here, of tars without one, also has their versions, and their names are known
beforehand: it is compared with them and never trusted for names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from moco_scale.untrusted.documents import Document, DocumentError, check, parse_json
from moco_scale.untrusted.limits import CLASSES, LABEL_CHARACTERS, SAMPLES, SHARD_BYTES
from moco_scale.untrusted.names import PlainName, RelativePath
from moco_scale.utils.errors import UserError

FORMAT = "moco_scale shards"
VERSION = 1
# shard: position in the split's list of shards; offset, size: the image's bytes within that tar;
# label: class number, -1 for none.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])

_BLOCK = 512  # of a tar: an image stands behind a header at least
_ROWS_AT_ONCE = 1 << 20

Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""Hex BLAKE2b-128."""
_Bytes = Annotated[int, Field(ge=0, le=SHARD_BYTES)]
_Samples = Annotated[int, Field(ge=0, le=SAMPLES)]
_Class = Annotated[str, StringConstraints(max_length=LABEL_CHARACTERS)]
_Split = Annotated[PlainName, StringConstraints(max_length=100)]


class Tar(Document):
    """Entry of a tar."""

    name: str
    bytes: _Bytes
    samples: _Samples
    checksum: Checksum | None = None


class Shard(Tar):
    """Tar in an index from anybody."""

    name: RelativePath


class ScannedShard(Tar):
    """Tar that was scanned here.

    Attributes:
        name: in a form that JSON can hold: to be compared, not to be opened.
        version: tells versions at one address apart; "" of local tars.
    """

    version: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,32}$")] = ""


class _SplitBase(Document):
    samples: _Samples
    checksum: Checksum

    def _check_sums(self, shards: Sequence[Tar]) -> None:
        if sum(shard.samples for shard in shards) != self.samples:
            raise ValueError(f"the shards' samples do not add up to {self.samples}")
        if sum(shard.bytes for shard in shards) > SHARD_BYTES:
            raise ValueError("the shards have more bytes than any set")


class Split(_SplitBase):
    """Split of a set that was made or fetched."""

    shards: list[Shard]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        self._check_sums(self.shards)
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is named twice")
        return self


class ScannedSplit(_SplitBase):
    """Split of tars that were scanned here."""

    shards: list[ScannedShard]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        self._check_sums(self.shards)
        return self


class _IndexBase(Document):
    format: Literal["moco_scale shards"]
    version: Literal[1]
    classes: Annotated[list[_Class], Field(max_length=CLASSES)]
    made: dict[str, Any] = Field(default_factory=dict)
    """How it was made; for people."""


class ShardIndex(_IndexBase):
    """Schema of index.json of a folder of shards, or of their address."""

    splits: Annotated[dict[_Split, Split], Field(min_length=1, max_length=64)]


class ScannedIndex(_IndexBase):
    """Schema of index.json of tars without one, written by this program to its own folder."""

    splits: Annotated[dict[_Split, ScannedSplit], Field(min_length=1, max_length=64)]


class CheckedNote(Document):
    """SPLIT-checked.json: tars whose headers are right.

    Attributes:
        index: checksum of the index that they were compared with.
        right: of each tar, the times of change in nanoseconds at which they were.
    """

    index: str
    right: list[list[int]]


AnyIndex = ShardIndex | ScannedIndex


def parse_index(content: bytes, what: str) -> ShardIndex:
    """Read index.json of a folder or of an address.

    Raises:
        DocumentError: It is damaged, of another version, or of something else.
    """
    return check(_of_this_format(content, what), ShardIndex, f"{what} is damaged")


def parse_scanned_index(content: bytes, what: str) -> ScannedIndex:
    """Read index.json of tars that were scanned here. Raises as :func:`parse_index` does."""
    return check(_of_this_format(content, what), ScannedIndex, f"{what} is damaged")


def _of_this_format(content: bytes, what: str) -> Any:
    try:
        header = parse_json(content, "it")
    except DocumentError as error:
        raise DocumentError(f"{what} is damaged ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DocumentError(f"{what} is not an index of {FORMAT}")
    version = header.get("version")
    if isinstance(version, int) and version != VERSION:
        raise DocumentError(
            f"{what} has format version {version if 0 <= version < 10**9 else '?'}, this program "
            f"reads version {VERSION}"
        )
    return header


def rows_problem(rows: np.ndarray, split: Split | ScannedSplit, classes: int) -> str | None:
    """Describe how rows of INDEX_DTYPE [N] do not fit a split; None: they fit.

    No sum can overflow, and a million rows are checked at a time.
    """
    sizes = np.array([shard.bytes for shard in split.shards], dtype=np.uint64)
    counts = np.zeros(len(sizes), dtype=np.int64)
    last = 0
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[first : first + _ROWS_AT_ONCE]
        shard, size = part["shard"], part["size"].astype(np.uint64)
        if int(shard.max()) >= len(sizes):
            return "points outside the shards: there are not so many"
        whole = sizes[shard]
        if bool((size > whole).any()) or bool((size == 0).any()):
            return "points outside the shards: an image is larger than its shard, or empty"
        if bool((part["offset"] > whole - size).any()) or bool((part["offset"] < _BLOCK).any()):
            return "points outside the shards: an image begins where there is none"
        if int(shard[0]) < last or bool((shard[1:] < shard[:-1]).any()):
            return "is not in the order of the shards"
        last = int(shard[-1])
        counts += np.bincount(shard, minlength=len(sizes))
        if int(part["label"].min()) < -1 or int(part["label"].max()) >= classes:
            return "has labels that are no class"
    if counts.tolist() != [shard.samples for shard in split.shards]:
        return "has other numbers of images for the shards than index.json"
    return None


def require_names(index: ScannedIndex, splits: dict[str, list[str]], what: str) -> None:
    """Raise UserError unless a scanned index is of these tars, by split and in this order."""
    found = {split: [s.name for s in entry.shards] for split, entry in index.splits.items()}
    if found != {split: [json_name(name) for name in names] for split, names in splits.items()}:
        raise UserError(f"{what} is of other tars")


def json_name(name: str) -> str:
    """Return a local file's name, which may have any bytes, in a form that JSON can hold."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
