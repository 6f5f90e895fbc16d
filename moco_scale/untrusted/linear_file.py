"""Plain values of an unfinished linear evaluation's file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from moco_scale.untrusted.documents import Document, at_most
from moco_scale.untrusted.limits import STEPS

Percent = Annotated[float, Field(ge=0, le=100)]


class Epoch(Document):
    """Results of one epoch; accuracies in percent."""

    train_loss: float
    train_top1: Percent
    top1: Percent
    top5: Percent


class Identity(Document):
    """Values that must be the same to continue an evaluation; others are compared too."""

    epochs: Annotated[int, Field(gt=0, lt=STEPS)]


class LinearFile(Document):
    """State of the evaluation."""

    identity: Annotated[Identity, at_most(200)]
    described: Annotated[dict[str, str], at_most(100)] = Field(default_factory=dict)
    history: Annotated[list[Epoch], at_most(100_000), Field(min_length=1)]


class Momenta(Document):
    """State of the optimizer by number of the parameter."""

    state: Annotated[dict[int, dict[str, Any]], at_most(100)]
