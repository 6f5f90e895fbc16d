"""Decoding of images to upright RGB pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg

from moco_scale.data.images.bad_image import DecodeError as DecodeError
from moco_scale.data.images.bad_image import as_decode_error, require_memory
from moco_scale.data.images.formats import image_kind, no_image
from moco_scale.data.images.jpeg_header import HOLE, Header, exif_place, read_header, tidied
from moco_scale.data.images.jpeg_header import orientation as orientation
from moco_scale.data.images.orientation import ORIENTATION as ORIENTATION
from moco_scale.data.images.orientation import UPRIGHT as UPRIGHT
from moco_scale.data.images.pil_decode import pil_pixels, pil_size

Pixels = npt.NDArray[np.uint8]

_KEPT_BYTES = 1 << 26

# What libjpeg warns of, and the strict decoder refuses, though it changes no pixel; see `tidied`.
_HARMLESS = (
    "extraneous bytes before marker",
    "unknown JFIF revision number",
    "bad ICC marker",
    "Invalid SOS parameters for sequential JPEG",
)
# The one of them that nothing is done about: all rows are there by then.
_BEFORE_THE_END = "extraneous bytes before marker 0xd9"
# What simplejpeg says of sampling factors and colour spaces that only Pillow knows.
_OF_PILLOW = ("CMYK", "YCCK", None)
_UNKNOWN = ("Could not determine subsampling", "Could not determine colorspace")


class Decoder:
    """Decodes one image after another into memory that it reuses.

    New memory for each image would be fetched from the system page by page, which takes an eighth
    of the decoding time.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, data: bytes | memoryview) -> Pixels:
        """Decode like `decode_rgb`; the next call may overwrite the pixels."""
        return _decode(data, self)

    def memory(self, size: int) -> npt.NDArray[np.uint8] | None:
        """Return at least `size` bytes, or None for more than is worth keeping."""
        if size > _KEPT_BYTES:
            return None
        if size > len(self._memory):
            self._memory = np.empty(max(size, 1 << 22), np.uint8)
        return self._memory


def decode_rgb(data: bytes | memoryview) -> Pixels:
    """Return the image in `data` as uint8 [H, W, 3] RGB, C-contiguous, upright.

    JPEG goes through simplejpeg, strictly: libjpeg's warnings are errors, since a file whose second
    half is zeros gives only a warning. Oddities of a header that change no pixel are corrected
    first (see `tidied`). PNG, WebP, GIF, BMP, TIFF, PPM, AVIF, JPEG 2000 and CMYK JPEG go through
    Pillow, without their metadata (see `image_pixels`). Of an animation the first frame counts;
    transparency is dropped, as `Image.convert("RGB")` does; 16-bit images are scaled to 8 bit. The
    orientation in EXIF, or else in XMP, is applied, as `PIL.ImageOps.exif_transpose` does.

    Raises:
        DecodeError: It is no whole image, or decoding would take more memory or time than allowed,
            which is checked before anything is allocated.
    """
    return _decode(data, None)


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return (height, width) of the upright image, from its header alone. Raises DecodeError."""
    kind = _kind(data)
    if kind != "JPEG":
        return pil_size(data, kind)
    with as_decode_error(kind):
        header = _checked_header(data)
        _strict_header(data)
    size = header.height, header.width
    return size[::-1] if UPRIGHT[header.orientation][0] else size


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Return (height, width) of a stored JPEG that simplejpeg decodes; else None.

    Raises:
        DecodeError: It begins as a JPEG and has no header.
    """
    if image_kind(data) != "JPEG":
        return None
    with as_decode_error("JPEG"):
        header = _checked_header(data)
        colours = _strict_header(data)
    return None if colours in _OF_PILLOW else (header.height, header.width)


def without_exif(jpeg: bytes | memoryview) -> bytes:
    """Return the image without its EXIF, for decoders that would apply its orientation."""
    exif = exif_place(jpeg)
    data = bytes(jpeg)
    if exif is None:
        return data
    return data[: exif.start] + bytes(exif.stop - exif.start) + data[exif.stop :]


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return pixels [H, W, 3] turned and mirrored upright."""
    swap, rows, columns = UPRIGHT[orientation]
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def _kind(data: bytes | memoryview) -> str:
    """Return the format, by Pillow's name. Raises DecodeError for other formats."""
    kind = image_kind(data)
    if kind is None:
        raise DecodeError(no_image(data))
    return kind


def _checked_header(data: bytes | memoryview) -> Header:
    """Read the header. Raises DecodeError: it is damaged, or the image too large."""
    header = read_header(data)
    # RGB or four inks, and coefficients; or RGB and a copy that is turned or cropped.
    a_pixel = max(max(3, header.components) + header.working, 6)
    require_memory(header.width * header.height * a_pixel, header.width, header.height)
    if header.least_bytes > len(data):
        raise DecodeError(
            f"broken JPEG: it is cut short, {len(data):,} bytes cannot hold "
            f"{header.width} x {header.height} pixels"
        )
    return header


def _decode(data: bytes | memoryview, decoder: Decoder | None) -> Pixels:
    kind = _kind(data)
    with as_decode_error(kind):
        if kind == "JPEG":
            header = _checked_header(data)
            decoded = _decode_jpeg(data, header, decoder)
            if decoded is not None:
                return upright(decoded, header.orientation)
        return upright(*pil_pixels(data, kind))


def _decode_jpeg(
    data: bytes | memoryview, header: Header, decoder: Decoder | None
) -> Pixels | None:
    """Return pixels as stored; None for those that Pillow has to decode.

    Raises:
        DecodeError: It is damaged.
        ValueError: It is damaged.
    """
    try:
        if header.components == 4:
            _strictly(data, "CMYK", None)  # Pillow would not notice damage
            return None
        memory = decoder.memory(3 * header.width * header.height) if decoder else None
        return _strictly(data, "RGB", memory)
    except ValueError as error:
        if _is_unknown(error):
            if HOLE in tidied(data):
                raise DecodeError("broken JPEG: a part of it was never written") from None
            return None
        if _BEFORE_THE_END in str(error):  # and Pillow still rejects a file that has no end
            return None
        raise


def _strictly(
    data: bytes | memoryview, colours: str, memory: npt.NDArray[np.uint8] | None
) -> Pixels:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, colorspace=colours, strict=True, buffer=memory
        )
    except ValueError as error:
        if not _harmless(error):
            raise
        pixels = simplejpeg.decode_jpeg(
            tidied(data), colorspace=colours, strict=True, buffer=memory
        )
    return pixels


def _strict_header(data: bytes | memoryview) -> str | None:
    """Return the colour space; None where simplejpeg does not know it or the sampling.

    Raises:
        ValueError: The strict decoder refuses the header.
    """
    try:
        try:
            colours: str = simplejpeg.decode_jpeg_header(data)[2]
        except ValueError as error:
            if not _harmless(error):
                raise
            colours = simplejpeg.decode_jpeg_header(tidied(data))[2]
    except ValueError as error:
        if _is_unknown(error):
            return None
        raise
    return colours


def _is_unknown(error: Exception) -> bool:
    return any(words in str(error) for words in _UNKNOWN)


def _harmless(error: Exception) -> bool:
    return any(words in str(error) for words in _HARMLESS)
