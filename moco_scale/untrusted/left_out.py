"""A line of ``left_out.jsonl``: an image that is not in a set of shards."""

from __future__ import annotations

from moco_scale.untrusted.documents import Document


class LeftOutLine(Document):
    """What is asked of it again: ``SHARD:KEY`` of an image that a repair left out."""

    name: str
