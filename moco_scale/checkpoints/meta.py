"""``meta.json`` of a checkpoint."""

from __future__ import annotations

import zlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from moco_scale.config.saved_settings import Settings
from moco_scale.untrusted.documents import Document, at_most, check, parse_json
from moco_scale.untrusted.limits import STEPS
from moco_scale.untrusted.names import plain_problem, without
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

FORMAT = 1
INDEX = ".metadata"
_OWN = "own_crc32"
_FILES = 100_000
_LINE = 4000

Count = Annotated[int, Field(ge=0, lt=STEPS)]


def _shown(text: str) -> str:
    if printable(text, _LINE) != text:
        raise ValueError("has characters that do not print, or too many")
    return text


def _file_problem(name: str) -> str | None:
    return None if name == INDEX else plain_problem(name)


Shown = Annotated[str, AfterValidator(_shown)]
_File = Annotated[str, without(_file_problem)]
_Sizes = Annotated[dict[_File, Count], at_most(_FILES)]
_Sums = Annotated[dict[_File, Annotated[int, Field(ge=0, lt=1 << 32)]], at_most(_FILES)]


class Record(Document):
    """Line of the metrics; the values that a progress bar shows are required."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Shown, bool | Count | float | Shown | None]

    step: Count
    loss: float
    chance_loss: float
    lr: float
    images_per_second: float
    data_wait_fraction: float


class Unlogged(Document):
    """Log of a step whose evaluation is still to come."""

    record: Annotated[Record, at_most(1000)]
    line: Shown


class Meta(Document):
    """Plain values of a checkpoint; only the first four are there where no run wrote it."""

    format: Literal[1]
    step: Count
    files: _Sizes
    crc32: _Sums
    config: Settings | None = None
    data_fingerprint: Shown | None = None
    epoch: Count | None = None
    samples: Count | None = None
    processes: Count | None = None
    engine: Shown | None = None
    keep: bool = False
    unlogged: Unlogged | None = None

    @model_validator(mode="after")
    def _agree(self) -> Meta:
        if self.files.keys() != self.crc32.keys():
            raise ValueError("no usable crc32 of each of its files")
        if self.unlogged is not None and self.unlogged.record.step != self.step:
            raise ValueError(f"unlogged.record is of another step than {self.step}")
        return self


def sealed(text: str) -> str:
    """Add a checksum of its text to a JSON object, as the last value."""
    body = text.rstrip().removesuffix("}").rstrip()
    return body + _seal(body.encode())


def _seal(body: bytes) -> str:
    return f',\n "{_OWN}": {zlib.crc32(body)}\n}}\n'


def parse_meta(content: bytes, what: str) -> tuple[dict[str, Any], bool]:
    """Read a meta.json.

    Args:
        content: of the file.
        what: names the checkpoint in messages.

    Returns:
        The given values of :class:`Meta`, and whether a checksum covers them: those of earlier
        versions have none.

    Raises:
        UserError: It is no meta.json, or not what was written.
    """
    raw = parse_json(content, f"{what}: its meta.json")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{what} is not of format {FORMAT}, which this version reads")
    check(raw, Meta, f"{what} is damaged, or not of moco_scale: its meta.json has no usable value")
    body, mark, _ = content.rpartition(f',\n "{_OWN}": '.encode())
    if mark and content != body + _seal(body).encode():
        raise UserError(f"{what} is damaged: its meta.json is not what was written")
    # Without a checksum it is of an earlier version, which wrote only these.
    if not mark and raw.keys() - Meta.model_fields.keys():
        raise UserError(f"{what} is damaged: its meta.json has lost its checksum")
    return {name: raw[name] for name in Meta.model_fields if name in raw}, bool(mark)


def usable(raw: Any) -> dict[str, Any]:
    """Return the valid values of a damaged meta.json."""
    if not isinstance(raw, dict):
        return {}
    wrong: set[Any] = set()
    try:
        Meta.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        wrong = {problem["loc"][0] for problem in found if problem["loc"]}
    return {name: raw[name] for name in Meta.model_fields if name in raw and name not in wrong}
