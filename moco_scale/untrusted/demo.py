"""The marker of the output folder of a demo that can be gone on with."""

from __future__ import annotations

from typing import Any

from moco_scale.untrusted.documents import Document


class DemoSettings(Document):
    """Of the demo that made the folder; plain values by flag."""

    images: dict[str, Any]
    """What decides the shards."""
    train: dict[str, Any]
    """What defines the training."""
