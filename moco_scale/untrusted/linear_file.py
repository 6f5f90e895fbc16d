"""The plain values of an unfinished linear evaluation's file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from moco_scale.untrusted.documents import Document, at_most
from moco_scale.untrusted.limits import STEPS

Percent = Annotated[float, Field(ge=0, le=100)]


class Epoch(Document):
    """What was measured in one epoch; accuracies in percent."""

    train_loss: float
    train_top1: Percent
    top1: Percent
    top5: Percent


class Identity(Document):
    """What an evaluation must agree in to be continued; whatever else there is, is compared."""

    epochs: Annotated[int, Field(gt=0, lt=STEPS)]


class LinearFile(Document):
    """Where it stands."""

    identity: Annotated[Identity, at_most(200)]
    described: Annotated[dict[str, str], at_most(100)] = Field(default_factory=dict)
    history: Annotated[list[Epoch], at_most(100_000), Field(min_length=1)]


class Momenta(Document):
    """The optimizer's; a state by number of the parameter."""

    state: Annotated[dict[int, dict[str, Any]], at_most(100)]
