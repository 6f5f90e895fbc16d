"""Marker of a demo's output folder, which the demo can continue."""

from __future__ import annotations

from typing import Any

from moco_scale.untrusted.documents import Document


class DemoSettings(Document):
    """Settings of the demo that made the folder; plain values by flag."""

    images: dict[str, Any]
    """Settings of the shards."""
    train: dict[str, Any]
    """Settings of the training."""
