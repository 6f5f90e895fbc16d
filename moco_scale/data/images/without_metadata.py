"""Images without their metadata, for decoders, and their orientation.

So EXIF, XMP, texts or colour profiles cannot make a decoder fail; and of a file with several images
only the first remains.
"""

from __future__ import annotations

import binascii
import re
import struct
import zlib
from typing import NamedTuple

from moco_scale.data.images.bad_image import DecodeError, require_memory
from moco_scale.data.images.jpeg_header import read_header, tidied
from moco_scale.data.images.orientation import Entry, first_directory, orientation_of
from moco_scale.untrusted.limits import IMAGE_METADATA, IMAGE_PARTS


class Pixels(NamedTuple):
    """Image for a decoder that need not know metadata."""

    data: bytes
    orientation: int | None = 1
    """A key of UPRIGHT; None: the decoder knows."""
    working: float = 0
    """Bytes a pixel that the decoder holds besides the pixels it gives."""
    copies: int = 1
    """Copies of the file that it holds."""
    padding: float = 1
    """Pixels that are decoded for one of the image."""
    size: tuple[int, int] | None = None
    """(width, height) where the decoder needs them; others find them before they allocate."""


def image_pixels(data: bytes | memoryview, kind: str) -> Pixels:
    """Return an image of this kind without its metadata.

    Raises:
        DecodeError: Its structure is damaged.
    """
    match kind:
        case "JPEG":
            header = read_header(data)
            return Pixels(tidied(data), header.orientation, header.working, copies=4)
        case "PNG":
            return _png(data)
        case "WEBP":
            return _webp(data)
        case "TIFF":
            return _tiff(data)
        case "AVIF":
            # Its own property says how it is turned; EXIF, which must not, is made to be unknown.
            return Pixels(_AVIF_EXIF.sub(rb"\g<1>none", bytes(data)), None, working=16)
        case "JPEG2000":
            return Pixels(bytes(data), None, working=20)
        case "PPM":
            return Pixels(bytes(data), None, working=6)
        case _:
            return Pixels(bytes(data), None)


# The entry of an item: its box's version, flags, number and protection stand before its type.
_AVIF_EXIF = re.compile(rb"(infe(?:\x02...|\x03.....)....)Exif", re.DOTALL)

_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT")
_PNG_SAMPLES = {2: 3, 4: 2, 6: 4}  # by the type of colours; others have one
_DEFLATE = 1032  # so much shorter it makes anything at most
_PNG_TEXTS = {
    b"Raw profile type exif": "EXIF as text",
    b"Raw profile type APP1": "EXIF as text",
    b"Raw profile type xmp": "XMP",
    b"XML:com.adobe.xmp": "XMP",
}


def _png(data: bytes | memoryview) -> Pixels:
    """Keep the chunks of pixels, whose checksums must be right.

    An animation's other frames go too.
    """
    view, at, parts = memoryview(data), 8, [data[:8]]
    found: dict[str, tuple[int, int]] = {}  # where the first of each lies
    for _ in range(IMAGE_PARTS):
        if at + 8 > len(view):
            break
        size, kind = struct.unpack_from(">I4s", view, at)
        if at == 8 and (kind != b"IHDR" or size != 13):
            raise DecodeError("broken PNG: it does not begin with its header")
        if kind == b"IEND" or not kind.isalpha():  # whether all rows are there is seen by then
            break
        body, end = view[at + 8 : at + 8 + size], at + 12 + size
        if kind[:1].isupper():
            if kind not in _PNG_PIXELS or (kind == b"IHDR" and at > 8):
                raise DecodeError(f"broken PNG: a chunk {kind.decode()} stands where none may be")
            if end > len(view):
                raise DecodeError(f"broken PNG: it ends within a chunk {kind.decode()}")
            if not _checksum_is_right(view, at, size):
                raise DecodeError(f"broken PNG: the checksum of a chunk {kind.decode()} is wrong")
            parts.append(view[at:end])
        elif end <= len(view):
            found.setdefault(_png_metadata(kind, body), (at, size))
        at = end
    else:
        raise DecodeError(f"broken PNG: it has more than {IMAGE_PARTS:,} chunks")
    parts.append(b"\0\0\0\0IEND\xaeB`\x82")
    pixels = b"".join(parts)
    width, height, depth, colours = struct.unpack_from(">IIBB", pixels.ljust(26, b"\0"), 16)
    if width * height * depth * _PNG_SAMPLES.get(colours, 1) // 8 > _DEFLATE * len(pixels):
        require_memory(width * height * 6, width, height)
        raise DecodeError(
            f"broken PNG: it is cut short, {len(pixels):,} bytes cannot hold "
            f"{width} x {height} pixels"
        )
    exif = _png_text(view, *found["EXIF"]) if "EXIF" in found else b""
    if not exif and "EXIF as text" in found:
        exif = _png_text(view, *found["EXIF as text"])
    xmp = _png_text(view, *found["XMP"]) if "XMP" in found else b""
    return Pixels(pixels, orientation_of(exif, xmp))


def _png_metadata(kind: bytes, body: memoryview) -> str:
    """Name the metadata that a chunk holds; "": none of interest."""
    if kind == b"eXIf":
        return "EXIF"
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        return _PNG_TEXTS.get(bytes(body[:80]).split(b"\0")[0], "")
    return ""


def _checksum_is_right(png: memoryview, at: int, size: int) -> bool:
    expected = int.from_bytes(png[at + 8 + size : at + 12 + size], "big")
    return zlib.crc32(png[at + 4 : at + 8 + size]) == expected


def _png_text(png: memoryview, at: int, size: int) -> bytes:
    """Return the content of a metadata chunk, inflated as far as needed.

    b"" where its checksum is wrong or it cannot be read.
    """
    kind, body = bytes(png[at + 4 : at + 8]), bytes(png[at + 8 : at + 8 + size])
    if not _checksum_is_right(png, at, size):
        return b""
    if kind == b"eXIf":
        return body
    keyword, _, text = body.partition(b"\0")
    deflated = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"iTXt":
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif kind == b"zTXt":
        text = text[1:]
    if deflated:
        try:
            text = zlib.decompressobj().decompress(text, IMAGE_METADATA)
        except zlib.error:
            return b""
    return _from_hex(text) if keyword.startswith(b"Raw") else text


def _from_hex(profile: bytes) -> bytes:
    r"""Decode ImageMagick's "\nname\nlength\n" and hexadecimal lines."""
    digits = b"".join(profile.split(b"\n")[3:])
    try:
        return binascii.unhexlify(digits[: len(digits) // 2 * 2])
    except binascii.Error:
        return b""


_WEBP_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags of VP8X: profile, EXIF, XMP


def _webp(data: bytes | memoryview) -> Pixels:
    """Keep the chunks of pixels, and clear the header's flags of the others."""
    view, parts = memoryview(data), list[bytes | memoryview]()
    exif, xmp, at = b"", b"", 12
    stop = min(len(view), 8 + int.from_bytes(view[4:8], "little"))
    for _ in range(IMAGE_PARTS):
        if at + 8 > stop:
            break
        kind, size = struct.unpack_from("<4sI", view, at)
        end = at + 8 + size + size % 2
        if kind in _WEBP_PIXELS:
            if at + 8 + size > len(view):
                raise DecodeError(f"broken WEBP: it ends within a chunk {kind.decode().strip()}")
            if kind == b"VP8X" and size:
                flags = bytes([view[at + 8] & ~_WEBP_METADATA])
                parts += [view[at : at + 8], flags, view[at + 9 : at + 8 + size]]
            else:
                parts.append(view[at : at + 8 + size])
            parts.append(bytes(size % 2))
        elif kind == b"EXIF":
            exif = exif or bytes(view[at + 8 : at + 8 + min(size, IMAGE_METADATA)])
        elif kind == b"XMP ":
            xmp = xmp or bytes(view[at + 8 : at + 8 + min(size, IMAGE_METADATA)])
        at = end
    else:
        raise DecodeError(f"broken WEBP: it has more than {IMAGE_PARTS:,} chunks")
    start = b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WEBP"
    pixels = b"".join([start, *parts])
    # The decoder has a canvas of four bytes a pixel, one of the frame before, and gives a copy.
    return Pixels(pixels, orientation_of(exif, xmp), 12, 3, size=_webp_size(pixels))


def _webp_size(webp: bytes) -> tuple[int, int]:
    """Return (width, height) from the first chunk; the decoder allocates before it tells."""
    kind, start = webp[12:16], webp[:30].ljust(30, b"\0")
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(start[24:27], "little"),
            1 + int.from_bytes(start[27:30], "little"),
        )
    if kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", start, 26)
    return width & 0x3FFF, height & 0x3FFF


_TIFF_PIXELS = frozenset(
    (
        *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320),
        *(322, 323, 324, 325, 332, 334, 338, 339, 347, *range(512, 522), *range(529, 533)),
    )
)
"""Tags that say where pixels lie and how they are coded."""
_TIFF_METHODS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
"""Compressions that photographs and scans come in: none, fax, LZW, JPEG, deflate, PackBits."""


def _tiff(data: bytes | memoryview) -> Pixels:
    """Append a directory with only the tags of pixels, and make it the first and last."""
    directory = first_directory(data)
    if directory is None:
        raise DecodeError("broken TIFF: it has no directory")
    kept: dict[int, Entry] = {}
    for entry in directory.entries:
        if entry.tag in _TIFF_PIXELS:
            kept.setdefault(entry.tag, entry)
    if any(entry.length > IMAGE_PARTS for entry in kept.values() if entry.tag != 347):
        raise DecodeError(f"broken TIFF: it has more than {IMAGE_PARTS:,} strips or tiles")
    number = directory._replace(entries=list(kept.values())).number
    if any(tag in kept and number(tag, 0) <= 0 for tag in (256, 257, 277, 322, 323)):
        raise DecodeError("broken TIFF: its sizes are no numbers")
    method = number(259, 1)
    if method not in _TIFF_METHODS:
        raise DecodeError(f"TIFF compressed by a method that is not read, {method}")
    width, height = max(1, number(256, 1)), max(1, number(257, 1))
    across, down = number(322, width), number(323, height)
    padded = _up(width, across) * _up(height, down)
    # One strip may be all of the image, in up to four samples of two bytes.
    samples = 0 if method == 1 else max(4, number(277, 1) * (4 if number(258, 8) > 16 else 2))
    order, big = directory.order, directory.big
    at = len(data) + len(data) % 2
    entries = b"".join(struct.pack(directory.layout, *kept[tag]) for tag in sorted(kept))
    where, count, none = (
        struct.pack(order + ("Q" if big else kind), value)
        for kind, value in (("I", at), ("H", len(kept)), ("I", 0))
    )
    parts = [
        *(data[: 8 if big else 4], where, data[16 if big else 8 :]),
        *(bytes(at - len(data)), count, entries, none),
    ]
    xmp = next((entry for entry in directory.entries if entry.tag == 700), None)
    place = 0 if xmp is None else int.from_bytes(xmp.value, "little" if order == "<" else "big")
    text = b"" if xmp is None else data[place : place + min(xmp.length, IMAGE_METADATA)]
    turned = orientation_of(directory, text)
    return Pixels(b"".join(parts), turned, samples, padding=padded / (width * height))


def _up(side: int, step: int) -> int:
    return -(-side // step) * step if step > 0 else side
