"""Encoded pictures to RGB pixels."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]


class DecodeError(Exception):
    """Bytes that are not a whole, readable picture; str() is a short reason."""


def decode_rgb(data: bytes | memoryview) -> Pixels:
    """The picture in `data` as uint8 [H, W, 3] RGB, C-contiguous.

    JPEG goes through simplejpeg, strictly: what libjpeg would only warn about is an error, since
    a warning is all it gives for a file whose second half is zeros. PNG, WebP, GIF, BMP, TIFF and
    CMYK JPEG go through PIL. Of an animation the first frame; transparency is dropped, as
    `Image.convert("RGB")` does; 16-bit pictures are scaled to 8 bit. The orientation in EXIF is
    ignored, as in every published ImageNet pipeline. Raises DecodeError.
    """
    if len(data) == 0:
        raise DecodeError("empty file")
    if bytes(data[:3]) != b"\xff\xd8\xff":
        return _decode_pil(data)
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace == "CMYK":
            return _decode_pil(data)
        return np.ascontiguousarray(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True))
    except ValueError as error:
        reason = str(error)
        # Stray bytes between two markers do no harm, and PIL still rejects a file cut short.
        if "extraneous bytes" in reason:
            return _decode_pil(data)
        raise DecodeError(f"broken JPEG: {reason}") from None


def _decode_pil(data: bytes | memoryview) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):
                return _from_16_bit(np.asarray(image))
            if image.mode == "F":
                raise DecodeError("floating-point pixels, for which no white is defined")
            if image.mode == "P":  # straight to RGB, PIL warns about some transparent palettes
                return np.array(image.convert("RGBA").convert("RGB"))
            return np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise DecodeError("not a picture in any known format") from None
    except DecodeError:
        raise
    except Exception as error:  # PIL's plugins raise nearly anything on broken input
        raise DecodeError(f"{type(error).__name__}: {error}") from None


def _from_16_bit(gray: npt.NDArray[np.generic]) -> Pixels:
    """Gray [H, W] with white at 65535 to RGB; PIL itself would clip at 255."""
    wide = gray.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise DecodeError("32-bit pixels, for which no white is defined")
    return np.repeat(((wide * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=-1)
