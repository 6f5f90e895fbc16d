"""Decoding by Pillow, in bounded memory, of every format but ordinary JPEG."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from moco_scale.data.images.bad_image import DecodeError, as_decode_error, require_memory
from moco_scale.data.images.orientation import orientation_of
from moco_scale.data.images.without_metadata import Pixels, image_pixels
from moco_scale.untrusted.limits import IMAGE_PIXELS, SLOW_IMAGE_PIXELS

Image.init()
# Pillow refuses what has more than twice as many; its own checks are never stricter than ours.
Image.MAX_IMAGE_PIXELS = IMAGE_PIXELS // 2
# What it says of odd files goes to nobody: there is nothing a user could do about it.
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)


def _silence_libtiff() -> None:
    """Keep libtiff from writing about bad files to the terminal."""
    with contextlib.suppress(OSError, AttributeError, StopIteration):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        loaded = next(line for line in lines if "/libtiff" in line)
        ctypes.CDLL("/" + loaded.split("/", 1)[1]).TIFFSetErrorHandler(None)


_silence_libtiff()

_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"""Bytes a pixel of Pillow's modes; all others have four."""
_SLOW = ("ppm", "ppm_plain", "bmp_rle", "sgi16")
"""Pillow's decoders that are written in Python."""
_BLOCK = 1 << 20
"""Pixels that are turned into RGB at once."""


def pil_size(data: bytes | memoryview, kind: str) -> tuple[int, int]:
    """Return (height, width) of the upright image, from its header alone.

    Raises:
        DecodeError: The header is damaged, or decoding would take too much memory.
    """
    with _opened(data, kind) as (image, turned):
        return (image.width, image.height) if turned > 4 else (image.height, image.width)


def pil_pixels(data: bytes | memoryview, kind: str) -> tuple[npt.NDArray[np.uint8], int]:
    """Return RGB as stored, uint8 [H, W, 3], and its orientation.

    Raises:
        DecodeError: The image is not whole, or decoding would take too much memory.
    """
    with _opened(data, kind) as (image, turned):
        image.load()
        return _to_rgb(image), turned


@contextlib.contextmanager
def _opened(data: bytes | memoryview, kind: str) -> Iterator[tuple[Image.Image, int]]:
    """Open the image by Pillow without loading it, and read its orientation."""
    with as_decode_error(kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind not in Image.OPEN:
            raise DecodeError(f"{kind}, which the installed Pillow does not decode")
        bare = image_pixels(data, kind)
        if bare.size is not None:
            _require_memory(bare, 4, *bare.size)
        try:
            image = Image.open(io.BytesIO(bare.data), formats=[kind])
        except Image.DecompressionBombError as error:
            raise DecodeError(f"too large: {error}".partition(",")[0]) from None
        except Image.UnidentifiedImageError:
            raise DecodeError(f"broken {kind}: its header is no whole one") from None
        with image:
            _require_memory(bare, _STORED.get(image.mode, 4), *image.size)
            if image.width * image.height > SLOW_IMAGE_PIXELS and _is_slow(image):
                raise DecodeError(
                    f"{kind} of a rare form and {image.width} x {image.height} pixels, which would "
                    f"take minutes: {SLOW_IMAGE_PIXELS:,} are decoded"
                )
            yield image, _orientation(image) if bare.orientation is None else bare.orientation


def _require_memory(bare: Pixels, stored: int, width: int, height: int) -> None:
    """Raise DecodeError where file, decoding, conversion or turning take too much memory."""
    a_pixel = max(bare.padding * (bare.working + stored), stored + 3, 6)
    require_memory(width * height * a_pixel + bare.copies * len(bare.data), width, height)


def _is_slow(image: Image.Image) -> bool:
    return any(tile[0] in _SLOW for tile in getattr(image, "tile", ()))


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # of metadata, which is no reason to refuse the image
        return orientation_of(image.info.get("exif", b""), image.info.get("xmp", b""))
    return 1


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert block by block, so that the image is not held three times."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    columns = min(image.width, _BLOCK)
    rows = max(1, _BLOCK // columns)
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            right, bottom = min(left + columns, image.width), min(top + rows, image.height)
            whole = (right, bottom) == image.size and left == top == 0
            block = image if whole else image.crop((left, top, right, bottom))
            pixels[top:bottom, left:right] = _block_to_rgb(block)
    return pixels


def _block_to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert a block to uint8 [H, W, 3], or gray [H, W, 1]."""
    if image.mode.startswith("I"):
        return _from_16_bit(np.asarray(image))
    if image.mode == "F":
        raise DecodeError("floating-point pixels, for which no white is defined")
    if image.mode in ("P", "PA"):  # a palette may have transparency, which would be blended
        image = image.convert("RGBA")
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    return np.asarray(image.convert("RGB"))


def _from_16_bit(gray: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scale gray [H, W] with white at 65535 to [H, W, 1]; Pillow would clip at 255."""
    if gray.min() < 0 or gray.max() > 65535:
        raise DecodeError("32-bit pixels, for which no white is defined")
    # Exactly wide * 255 / 65535, rounded.
    return ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)[..., None]
