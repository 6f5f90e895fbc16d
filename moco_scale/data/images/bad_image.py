"""Error of an image that cannot be decoded, and conversion of other errors to it."""

from __future__ import annotations

import numpy as np

from moco_scale.untrusted.limits import IMAGE_MEMORY
from moco_scale.utils.text import printable


class DecodeError(Exception):
    """Bytes that are not a whole, readable image; str() is a short, printable reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


class as_decode_error:
    """Convert any error of a decoder on foreign bytes to DecodeError.

    Args:
        kind: assumed format of the image, such as "PNG".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, DecodeError) or not isinstance(error, Exception):
            return
        if isinstance(error, MemoryError):
            raise DecodeError(f"no memory was left to decode this {self.kind}") from None
        # Decoders raise nearly anything: struct.error, KeyError, SystemError.
        raise DecodeError(f"broken {self.kind}: {str(error) or type(error).__name__}") from None


def require_memory(needed: float, width: int, height: int) -> None:
    """Raise DecodeError for an image that would take more memory than allowed.

    Call it before anything is allocated.

    Args:
        needed: bytes held at the peak of its decoding.
        width: of the image.
        height: of the image.
    """
    # A row or two are held besides, and where each row lies: much only of an odd shape.
    needed += 32 * width + 16 * height
    if needed > IMAGE_MEMORY:
        raise DecodeError(
            f"too large: its header declares {width} x {height} pixels, which take "
            f"{needed / 1e9:.1f} GB to decode, and {IMAGE_MEMORY / 1e9:.1f} GB is the most"
        )


def only_zeros(data: bytes | memoryview) -> bool:
    """Tell whether a file is all zeros, as a copy that was cut short may be."""
    return len(data) > 0 and not np.frombuffer(data, np.uint8).any()
