"""``results.json`` of an evaluation."""

from __future__ import annotations

from typing import Any

from moco_scale.untrusted.documents import Document


class Results(Document):
    """What is relied on when another evaluation adds to it."""

    all: dict[str, dict[str, Any]]
    """The newest result of each kind of evaluation."""


class Accuracy(Document):
    """What a demo relies on."""

    top1: float
    """Of the evaluation that was written last, in percent."""
