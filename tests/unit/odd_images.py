"""Images with whatever stands in them besides pixels, made from whole ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 24


def photo() -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def whole(kind: str) -> bytes:
    """The photo, without loss but for JPEG and AVIF, in this format."""
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    image = photo().quantize(200) if kind == "GIF" else photo()
    return encoded(image, kind, **options)


def exif(value: int = 6, *, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    """TIFF whose only entry is an orientation; `value` as a whole number of type `kind`."""
    field = {1: "B3x", 3: "H2x", 4: "I", 5: "I", 7: "B3x", 8: "h2x", 9: "i", 2: "B3x"}[kind]
    tiff = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 1)
    inline = 26 if kind == 5 else value
    tiff += struct.pack(order + "HHI" + field, 0x0112, kind, count, inline)
    return tiff + struct.pack(order + "III", 0, value & 0xFFFFFFFF, 1)


def xmp(text: str) -> bytes:
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{text}</rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    ).encode()


ATTRIBUTE = xmp(
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
)
ELEMENT = xmp("<rdf:Description><tiff:Orientation>6</tiff:Orientation></rdf:Description>")
SINGLE_QUOTES = ATTRIBUTE.replace(b'"', b"'")


def chunk(kind: bytes, data: bytes, checksum: int = 0) -> bytes:
    """A chunk of PNG; its checksum is right but for the bits of `checksum`."""
    crc = zlib.crc32(kind + data) ^ checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_with(chunks: bytes, *, png: bytes | None = None, at_end: bool = False) -> bytes:
    """A PNG with chunks after its header, or before its end."""
    png = whole("PNG") if png is None else png
    at = len(png) - 12 if at_end else 33
    return png[:at] + chunks + png[at:]


def png(
    width: int, height: int, depth: int, colours: int, data: bytes, extra: bytes = b""
) -> bytes:
    """A PNG of any header; `data` is deflated."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def zeros(size: int) -> bytes:
    """So many zeros, deflated, made bit by bit."""
    deflate = zlib.compressobj(9)
    parts = [deflate.compress(bytes(min(1 << 20, size - at))) for at in range(0, size, 1 << 20)]
    return b"".join([*parts, deflate.flush()])


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(segments: bytes, jpeg: bytes | None = None) -> bytes:
    """A JPEG with segments behind its first two bytes."""
    jpeg = whole("JPEG") if jpeg is None else jpeg
    return jpeg[:2] + segments + jpeg[2:]


def webp_with(*chunks: tuple[bytes, bytes], flags: int = 0x2C) -> bytes:
    """A WebP in the extended form, with chunks behind the pixels."""
    pixels = whole("WEBP")[12:]
    header = struct.pack("<I", flags) + (WIDTH - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + header + (HEIGHT - 1).to_bytes(3, "little") + pixels
    behind = [kind + struct.pack("<I", len(d)) + d + bytes(len(d) % 2) for kind, d in chunks]
    body += b"".join(behind)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff_with(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """An uncompressed RGB TIFF with further entries (tag, type, count, value or its bytes)."""
    pixels = np.asarray(photo()).tobytes()
    everything = [
        *(
            (256, 3, 1, struct.pack(order + "H2x", WIDTH)),
            (257, 3, 1, struct.pack(order + "H2x", HEIGHT)),
        ),
        *(
            (258, 3, 3, struct.pack(order + "HHH", 8, 8, 8)),
            (259, 3, 1, struct.pack(order + "H2x", 1)),
        ),
        *((262, 3, 1, struct.pack(order + "H2x", 2)), (273, 4, 1, struct.pack(order + "I", 8))),
        *(
            (277, 3, 1, struct.pack(order + "H2x", 3)),
            (278, 3, 1, struct.pack(order + "H2x", HEIGHT)),
        ),
        (279, 4, 1, struct.pack(order + "I", len(pixels))),
        *entries,
    ]
    body, directory = pixels, b""
    for tag, kind, count, value in sorted(everything):
        if len(value) > 4:
            pointer = struct.pack(order + "I", 8 + len(body))
            body += value + bytes(len(value) % 2)
            value = pointer
        directory += struct.pack(order + "HHI", tag, kind, count) + value
    start = struct.pack(order + "HI", 42, 8 + len(body))
    number = struct.pack(order + "H", len(everything))
    return {"<": b"II", ">": b"MM"}[order] + start + body + number + directory + bytes(4)
