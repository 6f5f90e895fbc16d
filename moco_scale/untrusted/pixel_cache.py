"""``meta.json`` of a folder of decoded images."""

from __future__ import annotations

from moco_scale.untrusted.documents import Document


class PixelCacheMeta(Document):
    """Values that must match for its pixels to be valid and on the disk."""

    format: int
    fingerprint: str
    """Fingerprint of the images."""
    decoders: list[str]
    """Versions of the libraries that decode."""
    sizes: dict[str, int]
    """Bytes of each file."""
    table: int
    """CRC-32 of the table of places."""
    boot: str
    """Start of the machine when this was written; "" where unknown."""
    complete: bool
    """Everything is decoded, and was on the disk before this was written."""
