"""Encoded pictures to RGB pixels, the right way up."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageCms

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""The largest picture that is decoded; PIL refuses larger ones too, by default.

A header may declare any size. Believing it would take gigabytes before the first pixel is found to
be missing.
"""

# PIL tries every plugin it has on bytes it does not know, one of which starts another program.
Image.init()
_FORMATS: list[str] = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]
# From half of MAX_PIXELS on; there is nothing a user could do about it.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

ORIENTATION = 0x0112  # EXIF's tag
# What makes a picture of each orientation upright: (swap the axes, then flip rows, flip columns).
UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_KEPT_BYTES = 1 << 26
_JPEG = b"\xff\xd8\xff"  # how one begins

# What libjpeg warns of, and the strict decoder refuses, though it changes no pixel; see `_tidied`.
_HARMLESS = (
    "extraneous bytes before marker",
    "unknown JFIF revision number",
    "bad ICC marker",
    "Invalid SOS parameters for sequential JPEG",
)
# The one of them that nothing is done about: all rows are there by then.
_BEFORE_THE_END = "extraneous bytes before marker 0xd9"
# What simplejpeg says of sampling factors and colour spaces that only PIL knows.
_UNKNOWN = ("Could not determine subsampling", "Could not determine colorspace")
_MARKER = re.compile(rb"\xff+[^\0\xff]")


class DecodeError(Exception):
    """Bytes that are not a whole, readable picture; str() is a short reason."""


class Decoder:
    """Decodes one picture after another into memory that it keeps.

    Memory of its own for each picture would be fetched from the system page by page and given
    back, which takes an eighth of the time that decoding takes.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, data: bytes | memoryview) -> Pixels:
        """As `decode_rgb`, but the pixels may be overwritten by the next call."""
        return _decode(data, self)

    def memory(self, size: int) -> npt.NDArray[np.uint8] | None:
        """At least `size` bytes, or None for more than is worth keeping."""
        if size > _KEPT_BYTES:
            return None
        if size > len(self._memory):
            self._memory = np.empty(max(size, 1 << 22), np.uint8)
        return self._memory


def decode_rgb(data: bytes | memoryview) -> Pixels:
    """The picture in `data` as uint8 [H, W, 3] RGB, C-contiguous, upright.

    JPEG goes through simplejpeg, strictly: what libjpeg would only warn about is an error, since
    a warning is all it gives for a file whose second half is zeros. Oddities of a header that
    change no pixel are put right first (see `_tidied`). PNG, WebP, GIF, BMP, TIFF and
    CMYK JPEG go through PIL. Of an animation the first frame; transparency is dropped, as
    `Image.convert("RGB")` does; 16-bit pictures are scaled to 8 bit. The orientation in EXIF is
    applied, as `PIL.ImageOps.exif_transpose` does. Raises DecodeError, before anything
    is allocated for a picture of more than MAX_PIXELS.
    """
    return _decode(data, None)


def orientation(jpeg: bytes | memoryview) -> int:
    """EXIF's orientation of a JPEG, a key of UPRIGHT; 1 when it has none, or nonsense."""
    exif = _exif_segment(jpeg)
    return 1 if exif is None else _exif_orientation(bytes(jpeg[exif]))


def without_exif(jpeg: bytes | memoryview) -> bytes:
    """The same picture for decoders that may turn it: none finds an orientation in it."""
    exif = _exif_segment(jpeg)
    data = bytes(jpeg)
    if exif is None:
        return data
    return data[: exif.start] + bytes(exif.stop - exif.start) + data[exif.stop :]


def _exif_segment(jpeg: bytes | memoryview) -> slice | None:
    """Where EXIF's TIFF structure lies in a JPEG.

    Walks over the segments before the picture itself, a few of them; only a camera's APP1 is read.
    """
    at, end = 2, len(jpeg)
    while at + 4 <= end and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # the picture begins
            break
        after = at + 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
        if marker == 0xE1 and bytes(jpeg[at + 4 : at + 10]) == b"Exif\0\0":
            return slice(at + 10, max(at + 10, min(after, end)))
        at = after
    return None


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG as it is stored, if simplejpeg decodes such; else None.

    Raises DecodeError when it begins as a JPEG does and has no header.
    """
    if bytes(data[:3]) != _JPEG:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if any(words in str(error) for words in _UNKNOWN):
            return None
        raise DecodeError(f"broken JPEG: {error}") from None
    _check_size(width, height)
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def picture_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone. Raises DecodeError."""
    data, size = _header(data)
    if size is not None:
        turned = orientation(data)
    else:
        with _opened(data) as image:
            turned = _orientation_of(image, data)
            size = image.height, image.width
    return size[::-1] if UPRIGHT[turned][0] else size


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels [H, W, 3] as stored, turned and mirrored to how they are to be looked at."""
    swap, rows, columns = UPRIGHT[orientation]
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def _decode(data: bytes | memoryview, decoder: Decoder | None) -> Pixels:
    if len(data) == 0:
        raise DecodeError("empty file")
    data, size = _header(data)
    if size is None:
        return _decode_pil(data)
    memory = decoder.memory(3 * size[0] * size[1]) if decoder else None
    try:
        try:
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=memory)
        except ValueError as error:
            if not _harmless(error):
                raise
            data = _tidied(data)
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=memory)
    except ValueError as error:
        if _BEFORE_THE_END in str(error):  # and PIL still rejects a file that has no end
            return _decode_pil(data)
        raise DecodeError(f"broken JPEG: {error}") from None
    return upright(pixels, orientation(data))


def _header(data: bytes | memoryview) -> tuple[bytes | memoryview, tuple[int, int] | None]:
    """The same picture with a header that the strict decoder takes, and its `jpeg_size`."""
    try:
        return data, jpeg_size(data)
    except DecodeError as error:
        if not _harmless(error):
            raise
    data = _tidied(data)
    return data, jpeg_size(data)


def _harmless(error: Exception) -> bool:
    return any(words in str(error) for words in _HARMLESS)


def _tidied(jpeg: bytes | memoryview) -> bytes:
    """The same JPEG without what `_HARMLESS` lists, for a strict decoder to find what is left.

    Stray bytes between the segments before the picture go, and so do segments that say nothing
    about pixels; a JFIF version that nobody knows becomes 1, and a sequential scan is said to hold
    all coefficients, which it does by definition.
    """
    data = bytes(jpeg)
    parts, at, sequential = [data[:2]], 2, False
    while (found := _MARKER.search(data, at)) is not None:
        marker, body = data[found.end() - 1], found.end()
        at = body + int.from_bytes(data[body : body + 2], "big")
        segment = data[body:at]
        if 0xD0 <= marker <= 0xDA or len(segment) < 2:
            rest = data[found.end() - 2 :]
            return b"".join(parts) + (_all_coefficients(rest) if sequential else rest)
        sequential |= marker in (0xC0, 0xC1)
        if marker == 0xE0 and segment[2:7] == b"JFIF\0":
            segment = segment[:7] + b"\1" + segment[8:]
        if marker in (0xE0, 0xE1, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts += [b"\xff", bytes([marker]), segment]
    return data


def _all_coefficients(scans: bytes) -> bytes:
    """Scans, from the first one's marker on, whose headers say what sequential ones have to say."""
    changed, at = bytearray(scans), 0
    while (at := scans.find(b"\xff\xda", at)) >= 0:  # within a scan 255 is followed by 0
        components = scans[at + 4] if at + 4 < len(scans) else 0
        end = at + 5 + 2 * components
        if end + 3 <= len(scans):
            changed[end : end + 3] = b"\0\x3f\0"
        at += 2
    return bytes(changed)


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in EXIF's first directory."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
                return value if value in UPRIGHT else 1
    except (KeyError, struct.error):  # damaged, which is no reason to refuse the picture
        pass
    return 1


_TOO_LARGE = (
    f"its header declares more than {MAX_PIXELS / 1e6:.0f} million pixels, the most that is decoded"
)


def _check_size(width: int, height: int) -> None:
    """DecodeError for a picture of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{_TOO_LARGE}: {width} x {height}")


def _decode_pil(data: bytes | memoryview) -> Pixels:
    with _opened(data) as image:
        image.load()  # of TIFF this applies the orientation, of PNG it may find one at the end
        return upright(_to_rgb(image), _orientation_of(image, data))


@contextlib.contextmanager
def _opened(data: bytes | memoryview) -> Iterator[Image.Image]:
    """The picture as PIL sees it; its errors, there and within, as DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            yield image
    except Image.UnidentifiedImageError:
        if bytes(data[:3]) == _JPEG:
            raise DecodeError("broken JPEG: its header is no whole one") from None
        raise DecodeError("not a picture in any known format") from None
    except Image.DecompressionBombError:
        raise DecodeError(_TOO_LARGE) from None
    except DecodeError:
        raise
    except Exception as error:  # PIL's plugins raise nearly anything on broken input
        kind = "broken JPEG" if bytes(data[:3]) == _JPEG else type(error).__name__
        raise DecodeError(f"{kind}: {error}") from None


def _orientation_of(image: Image.Image, data: bytes | memoryview) -> int:
    if bytes(data[:3]) == _JPEG:
        return orientation(data)
    turned = image.getexif().get(ORIENTATION, 1)
    return turned if turned in UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _from_16_bit(np.asarray(image))
    if image.mode == "F":
        raise DecodeError("floating-point pixels, for which no white is defined")
    if image.mode in ("P", "PA"):  # straight to RGB, PIL warns about some transparent palettes
        image = image.convert("RGBA")
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    return np.array(image.convert("RGB"))


def _from_16_bit(gray: npt.NDArray[np.generic]) -> Pixels:
    """Gray [H, W] with white at 65535 to RGB; PIL itself would clip at 255."""
    wide = gray.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise DecodeError("32-bit pixels, for which no white is defined")
    return np.repeat(((wide * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=-1)
