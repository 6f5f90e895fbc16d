"""Fuzz target: any bytes as a PNG give an image of the size that its header says, or one error."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moco_scale.data.images.decode import DecodeError, Decoder, decode_rgb, image_size


def SEEDS() -> list[bytes]:
    """Small PNGs of every form of pixels, with metadata before and behind them."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((23, 14), Image.Resampling.BICUBIC)
    alpha = image.copy()
    alpha.putalpha(90)
    seeds = [_png(image.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "I;16")]
    seeds += [_png(alpha), _png(image.quantize(4), bits=2, transparency=b"\0a")]
    texts = PngInfo()
    texts.add_text("Comment", "hello", zip=True)
    texts.add_itxt("XML:com.adobe.xmp", '<r tiff:Orientation="8"/>', zip=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = b"\nexif\n      34\n" + turned.tobytes().hex().encode()
    texts.add_text("Raw profile type exif", profile.decode(), zip=True)
    seeds += [_png(image, pnginfo=texts), _png(image, exif=turned, icc_profile=b"a profile")]
    seeds.append(_png(image, save_all=True, append_images=[image.rotate(180)]))
    exif = turned.tobytes()[6:]
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    seeds += [seeds[4][:-12] + chunk + seeds[4][-12:], seeds[4] + b"trailing", _deep()]
    return seeds


def _png(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def _deep() -> bytes:
    """Sixteen bits a colour, in the passes of Adam7."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, 6, 0, 0, 1)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + bytes(range(8)))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def run(data: bytes, folder: Path) -> None:
    """Decode as it is, and with the checksums of its chunks put right, which a fuzzer cannot."""
    for each in (data, _mended(data)):
        try:
            size = image_size(each)
        except DecodeError as error:
            size = None
            assert str(error).isprintable()
        try:
            pixels = decode_rgb(each)
            assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
            assert pixels.shape == (*(size or ()), 3)
            assert np.array_equal(Decoder()(memoryview(each)), pixels)
        except DecodeError as error:
            assert str(error).isprintable()


def _mended(png: bytes) -> bytes:
    mended, at = bytearray(png), 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(png[at + 4 : end]))
        at = end + 4
    return bytes(mended)
