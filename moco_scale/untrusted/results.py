"""``results.json`` of an evaluation."""

from __future__ import annotations

from typing import Any

from moco_scale.untrusted.documents import Document


class Results(Document):
    """Values that another evaluation relies on when it adds to the file."""

    all: dict[str, dict[str, Any]]
    """The newest result of each kind of evaluation."""


class Accuracy(Document):
    """Values that a demo relies on."""

    top1: float
    """Accuracy of the last evaluation, in percent."""
