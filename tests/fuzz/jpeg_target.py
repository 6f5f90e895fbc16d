"""Fuzz target: any bytes as a JPEG give an image of the size that its header says, or one error."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from moco_scale.data.images.decode import (
    DecodeError,
    Decoder,
    decode_rgb,
    image_size,
    jpeg_size,
    orientation,
    without_exif,
)
from moco_scale.data.images.device_decode import can_decode


def SEEDS() -> list[bytes]:
    """Small JPEGs of every colour space and sampling, with metadata."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((35, 26), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    seeds = [_jpeg(image, subsampling=s, quality=60) for s in (0, 1, 2)]
    seeds += [_jpeg(image.convert(mode), quality=60) for mode in ("L", "CMYK")]
    seeds += [_jpeg(image, progressive=True), _jpeg(image.convert("CMYK"), progressive=True)]
    seeds += [_jpeg(image, restart_marker_blocks=1), _jpeg(image, exif=turned)]
    inks = bytearray(seeds[4])
    inks[inks.index(b"Adobe") + 11] = 2  # as luma and chroma
    text = b'http://ns.adobe.com/xap/1.0/\0<r tiff:Orientation="8"/>'
    further = [b"\xff\xe1" + struct.pack(">H", len(text) + 2) + text]
    further += [b"\xff\xe2\0\x12ICC_PROFILE\0\3\2ab", b"\xff\xfe\0\4ab", b"\0\1\2", b"\xff\xff"]
    seeds += [bytes(inks), *(seeds[0][:2] + extra + seeds[0][2:] for extra in further)]
    return [*seeds, seeds[0] + b"trailing", seeds[0][:-2] + b"\0\1\2\xff\xd9"]


def _jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def run(data: bytes, folder: Path) -> None:
    """Decode in every way there is. Whatever leaves this but AssertionError is a fault too."""
    try:
        size = image_size(data)
    except DecodeError as error:
        size = None
        assert str(error).isprintable()
    try:
        pixels = decode_rgb(data)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        assert pixels.shape == (*(size or ()), 3)
        assert np.array_equal(Decoder()(memoryview(data)), pixels)
        if data[:3] == b"\xff\xd8\xff":
            assert orientation(without_exif(data)) in range(1, 9)
    except DecodeError as error:
        assert str(error).isprintable()
    try:
        assert not can_decode(data) or jpeg_size(data) is not None
    except DecodeError:
        raise AssertionError("left to the device without a header") from None
