"""Settings of a run in its files: ``config`` of meta.json, ``opt`` of current.pth."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, Field

from moco_scale.config.schema import SECTIONS
from moco_scale.models.encoder import HEADS
from moco_scale.models.registry import MODELS, STEMS, WIDTHS
from moco_scale.untrusted.documents import Document, at_most
from moco_scale.untrusted.limits import IMAGE_SIZE, STEPS
from moco_scale.utils.text import printable, some_of

_FLAG = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MANY = 300  # flags, or numbers in one
_TEXT = 1 << 16


@cache
def _kinds() -> dict[str, Any]:
    """Return the type of each flag's value."""
    hints = {name: get_type_hints(section) for name, section in SECTIONS.items()}
    return {
        field.name: hints[name][field.name]
        for name, section in SECTIONS.items()
        for field in fields(section)
    }


def _settings(value: dict[str, Any]) -> dict[str, Any]:
    wrong = []
    for name, each in value.items():
        if not _FLAG.fullmatch(name):
            raise ValueError(f"{printable(name, 60)!r} is no name of a flag")
        if problem := _problem(_kinds().get(name), each):
            wrong.append(f"{name} {printable(each, 60)!r} {problem}")
    if wrong:
        raise ValueError(some_of(wrong, between="; "))
    return value


def _problem(kind: Any, value: Any) -> str | None:
    """Explain why a value does not fit a flag's type; None: it fits.

    An unknown flag, as of another version, may have any plain value.
    """
    if isinstance(value, bool) or value is None:
        fits = kind in (None, bool if value is not None else None)
    elif isinstance(value, int):
        fits = kind in (None, int, float) and abs(value) < STEPS
    elif isinstance(value, float):
        fits = kind in (None, float) and math.isfinite(value)
    elif isinstance(value, str):
        fits = kind in (None, str) and len(value) <= _TEXT
    elif isinstance(value, list):
        fits = kind not in (str, int, float, bool) and len(value) <= _MANY
        fits = fits and all(type(each) in (int, float, str) for each in value)
        fits = fits and not any(_problem(None, each) for each in value)
    else:
        fits = False
    return None if fits else "is no value of it"


Settings = Annotated[dict[str, Any], at_most(_MANY), AfterValidator(_settings)]
"""Schema type: plain values by flag name (underscores), of the types that the flags have."""


def _one_of(known: tuple[Any, ...]) -> AfterValidator:
    def check(value: Any) -> Any:
        if value not in known:
            raise ValueError(f"{printable(value, 60)} is none of {', '.join(map(str, known))}")
        return value

    return AfterValidator(check)


class EncoderSettings(Document):
    """Settings in a model file's ``opt`` that define the encoder and its input."""

    model: Annotated[str, _one_of(MODELS)]
    model_width: Annotated[int, _one_of(WIDTHS)]
    stem: Annotated[str, _one_of(STEMS)]
    head: Annotated[str, _one_of(HEADS)]
    dim: Annotated[int, Field(gt=0, lt=1 << 31)]
    image_size: Annotated[int, Field(gt=0, le=IMAGE_SIZE)]
    patch_size: Annotated[int, Field(ge=0, le=IMAGE_SIZE)] = 0  # earlier versions have none
    dataset: str | None = None


class ModelFile(Document):
    """Plain values of a model file."""

    opt: Settings
    epoch: Annotated[int, Field(ge=0, lt=STEPS)] = 0
    step: Annotated[int, Field(ge=0, lt=STEPS)] = 0
