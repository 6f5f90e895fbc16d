"""Images as they are in the world: whole ones with damaged or huge metadata, and others."""

import io
import itertools
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import odd_images as odd
import pytest
from odd_images import (
    chunk,
    encoded,
    exif,
    jpeg_with,
    png_with,
    segment,
    tiff_with,
    webp_with,
    whole,
)
from PIL import Image, ImageOps, features

from moco_scale.data.images.decode import DecodeError, decode_rgb, image_size

RANDOM = np.random.default_rng(0).bytes(3000)
LOOP = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) * 2 + struct.pack("<I", 8)
"""Directories that lead to themselves."""
TYPES = b"MM\0*\0\0\0\x08\0\x03" + b"".join(
    struct.pack(">HHII", tag, kind, 2**32 - 1, 2**32 - 1)
    for tag, kind in ((0x0112, 77), (0x8769, 12), (0x8825, 2))
)
LARGE = exif(1) + bytes(2_000_000)
BAD_EXIF = {
    "random": RANDOM,
    "empty": b"",
    "header alone": b"II*\0",
    "far away": b"II*\0" + b"\xff" * 400,
    "a loop": LOOP,
    "impossible types": TYPES,
    "2 MB": LARGE,
    "more entries than there are": exif()[:8] + b"\xff\xff",
    "prefix alone": b"Exif\0\0" * 5000,
}
BOMB = odd.zeros(200 << 20)
TEXTS = {
    "2 MB of text": chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
    "80 MB of texts": chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000) * 40,
    "a text that inflates": chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "an orientation that inflates": chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "XMP that inflates": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "a text that does not": chunk(b"zTXt", b"Raw profile type exif\0\0" + RANDOM),
    "XMP of no text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1" + RANDOM),
    "no keyword": chunk(b"tEXt", b""),
    "a profile that inflates": chunk(b"iCCP", b"p\0\0" + BOMB),
    "a profile of 2 MB": chunk(b"iCCP", b"p\0\0" + zlib.compress(RANDOM * 700)),
    "a profile of no known method": chunk(b"iCCP", b"p\0\x07" + RANDOM),
    "an empty profile": chunk(b"iCCP", b""),
    "short chunks": b"".join(chunk(k, b"") for k in (b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"tRNS")),
    "a wrong checksum of a text": chunk(b"tEXt", b"Comment\0hello", 1),
    "a wrong checksum of EXIF": chunk(b"eXIf", exif(), 1),
    "an animation without end": chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
    "an animation of nothing": chunk(b"acTL", b"") + chunk(b"fcTL", b"12"),
    "what nobody knows": chunk(b"vpAg", RANDOM) + chunk(b"zzZz", b""),
}


def with_exif(kind: str, data: bytes) -> bytes:
    match kind:
        case "PNG":
            return png_with(chunk(b"eXIf", data))
        case "PNG at its end":
            return png_with(chunk(b"eXIf", data), at_end=True)
        case "PNG as ImageMagick has it":
            text = b"\nexif\n%8d\n" % len(data) + (b"Exif\0\0" + data).hex().encode()
            return png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
        case "WEBP":
            return webp_with((b"EXIF", data))
        case "JPEG":
            parts = [data[at : at + 60_000] for at in range(0, len(data) or 1, 60_000)]
            return jpeg_with(b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts))
        case "AVIF":
            made = Image.Exif()
            made[0x010F] = "x" * 300
            fine = encoded(odd.photo(), "AVIF", exif=made)
            at = fine.index(b"x" * 300) - 26
            assert fine[at : at + 4] in (b"II*\0", b"MM\0*")
            return fine[:at] + data[:326].ljust(326, b"\0") + fine[at + 326 :]
    raise ValueError(kind)


EXIF_PLACES = ["PNG", "PNG at its end", "PNG as ImageMagick has it", "WEBP", "JPEG"]
if features.check("avif"):
    EXIF_PLACES.append("AVIF")


def plain(place: str) -> np.ndarray:
    return decode_rgb(whole(place.split()[0]))


def test_the_plain_images_are_the_photo() -> None:
    for kind in ("PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"):
        assert np.array_equal(decode_rgb(whole(kind)), np.asarray(odd.photo())), kind


@pytest.mark.parametrize("bad", BAD_EXIF)
@pytest.mark.parametrize("place", EXIF_PLACES)
def test_damaged_exif_ends_no_image(place: str, bad: str) -> None:
    data = with_exif(place, BAD_EXIF[bad])
    assert np.array_equal(decode_rgb(data), plain(place))
    assert image_size(data) == (odd.HEIGHT, odd.WIDTH)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("at_end", [False, True])
def test_texts_and_profiles_end_no_png(text: str, at_end: bool) -> None:
    data = png_with(TEXTS[text], at_end=at_end)
    assert np.array_equal(decode_rgb(data), plain("PNG"))
    assert image_size(data) == (odd.HEIGHT, odd.WIDTH)


def test_each_text_is_inflated_once() -> None:
    """Else a file of some MB would be inflated to a thousand times as much."""
    text = b"XML:com.adobe.xmp\0\1\0\0\0" + odd.zeros(4 << 20)[:-4] + b"abcd"
    data = png_with(chunk(b"iTXt", text) * 10_000 + chunk(b"eXIf", exif(1)))
    assert np.array_equal(decode_rgb(data), plain("PNG"))


def test_other_metadata_ends_no_image() -> None:
    multi = b"MPF\0" + RANDOM
    for junk in (
        *(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 65_000) * 40, segment(0xE2, multi)),
        *(
            segment(0xED, b"Photoshop 3.0\0" + RANDOM),
            segment(0xE0, b"JFIF\0\1\2\1\0\1\0\1\xff\xff"),
        ),
        *(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + RANDOM), segment(0xFE, RANDOM) * 30),
        *(segment(0xE0, b"JFXX\0\x10" + RANDOM), segment(0xEF, b""), b"\xff" * 5000),
    ):
        assert np.array_equal(decode_rgb(jpeg_with(junk)), plain("JPEG"))
    for chunks in (
        *([(b"ICCP", RANDOM * 700)], [(b"XMP ", b"\xff" * 2_000_000)], [(b"ZZZZ", RANDOM)]),
        [(b"EXIF", RANDOM), (b"EXIF", LOOP), (b"XMP ", b"")],
    ):
        assert np.array_equal(decode_rgb(webp_with(*chunks)), plain("WEBP"))
    cut = webp_with((b"EXIF", RANDOM))[:-1000]
    assert np.array_equal(decode_rgb(cut), plain("WEBP"))
    for order, (tag, kind, value) in itertools.product(
        "<>",
        [
            *[
                (700, 1, RANDOM),
                (34675, 7, RANDOM * 700),
                (34665, 4, RANDOM),
                (34665, 4, b"\x08\0\0\0"),
            ],
            *[(270, 2, RANDOM), (33432, 12, RANDOM), (34377, 7, RANDOM), (282, 5, bytes(8))],
            *[(330, 4, b"\xff" * 400), (37724, 7, RANDOM), (50706, 1, RANDOM[:4])],
        ],
    ):
        data = tiff_with([(tag, kind, max(1, len(value) // 4), value)], order)
        assert np.array_equal(decode_rgb(data), plain("TIFF")), tag


@pytest.mark.parametrize("place", EXIF_PLACES[:5])
@pytest.mark.parametrize(
    ("tiff", "expected"),
    [
        *[(exif(value, order=order), value) for value in range(1, 9) for order in "<>"],
        *[(exif(6, kind=kind, order=order), 6) for kind in (4, 8, 9) for order in "<>"],
        *[(exif(6, kind=kind, order=order), 1) for kind in (1, 2, 5, 7) for order in "<>"],
        *[(exif(value), 1) for value in (0, 9, 65535)],
        *[(exif(-1, kind=9), 1), (exif(6, count=2), 1), (exif(6, count=0), 1)],
        (b"Exif\0\0" + exif(8), 8),
    ],
)
def test_the_orientation_in_exif(place: str, tiff: bytes, expected: int) -> None:
    data = with_exif(place, tiff)
    turned = Image.Exif()
    turned[0x0112] = expected
    image = Image.fromarray(plain(place))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, "PNG", exif=turned))))
    assert np.array_equal(decode_rgb(data), np.asarray(upright))
    assert image_size(data) == upright.size[::-1]


@pytest.mark.parametrize("text", [odd.ATTRIBUTE, odd.ELEMENT, odd.SINGLE_QUOTES])
def test_the_orientation_in_xmp_alone(text: bytes) -> None:
    before = b"XML:com.adobe.xmp\0"
    app1 = b"http://ns.adobe.com/xap/1.0/\0"
    utf16 = text.decode().encode("utf-16")
    images = {
        "JPEG": [jpeg_with(segment(0xE1, app1 + text))],
        "PNG": [
            png_with(chunk(b"iTXt", before + b"\0\0\0\0" + text)),
            png_with(chunk(b"iTXt", before + b"\1\0en\0key\0" + zlib.compress(text)), at_end=True),
        ],
        "WEBP": [webp_with((b"XMP ", text)), webp_with((b"XMP ", utf16))],
        "TIFF": [
            tiff_with([(700, kind, len(text), text)], order) for kind in (1, 7) for order in "<>"
        ],
    }
    for kind, data in ((kind, data) for kind, many in images.items() for data in many):
        assert np.array_equal(decode_rgb(data), np.rot90(plain(kind), 3)), kind
        assert image_size(data) == (odd.WIDTH, odd.HEIGHT)
    # EXIF goes before it.
    both = webp_with((b"EXIF", exif(1)), (b"XMP ", text))
    assert np.array_equal(decode_rgb(both), plain("WEBP"))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
def test_a_tiff_is_turned_once(compression: str) -> None:
    data = encoded(odd.photo(), "TIFF", compression=compression, tiffinfo={0x0112: 6})
    straight = decode_rgb(encoded(odd.photo(), "TIFF", compression=compression))
    assert np.array_equal(decode_rgb(data), np.rot90(straight, 3))
    assert image_size(data) == (odd.WIDTH, odd.HEIGHT)


def test_one_wrong_checksum() -> None:
    """Where pixels are described the image is damaged, elsewhere it is whole."""
    png = whole("PNG")
    palette = encoded(odd.photo().quantize(20), "PNG")
    for data, name in ((png, b"IHDR"), (png, b"IDAT"), (palette, b"PLTE")):
        at = data.index(name)
        checksum = at + 4 + int.from_bytes(data[at - 4 : at], "big")
        damaged = data[:checksum] + bytes([data[checksum] ^ 1]) + data[checksum + 1 :]
        with pytest.raises(
            DecodeError, match=f"broken PNG: the checksum of a chunk {name.decode()}"
        ):
            decode_rgb(damaged)
        with pytest.raises(DecodeError, match="broken PNG"):
            image_size(damaged)
    end = png[:-4] + b"abcd"
    assert np.array_equal(decode_rgb(end), plain("PNG"))
    assert np.array_equal(decode_rgb(png[:-12]), plain("PNG"))  # all rows are there


def test_what_a_png_may_not_hold() -> None:
    png = whole("PNG")
    for damaged in (
        *(
            png[:8] + png[33:],
            png_with(chunk(b"IHDR", png[16:29])),
            png_with(chunk(b"CgBI", b"\0" * 4)),
        ),
        *(png[:8] + chunk(b"tEXt", b"a\0b") + png[8:], png[:60], png[:30], png[:8]),
    ):
        with pytest.raises(DecodeError, match="broken PNG: "):
            decode_rgb(damaged)


NOT_IMAGES = {
    "": "empty file",
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": "Git LFS",
    "<!DOCTYPE html>\n<html><title>404</title>": "HTML",
    "\n  <HTML>": "HTML",
    '<?xml version="1.0"?><svg/>': "SVG",
    "%!PS-Adobe-3.0 EPSF-3.0\n": "PostScript",
    "%PDF-1.7": "PDF",
    "Not found\n": "text",
    "PK\x03\x04....": "zip",
    "\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC",
    "\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "HEIC",
    "\0\0\0\x0cJXL \r\n": "JPEG XL",
    "\0\0\0\x18ftypmp42\0\0\0\0": "video",
    "8BPS\0\1": "PSD",
    "\0\0\1\0\1\0": "icon",
    "\0" * 600: "zeros",
    "\x01\x02\x03\x04\x05": "known format$",
}


@pytest.mark.parametrize("content", NOT_IMAGES)
def test_what_is_no_image_is_named(content: str) -> None:
    for call in (decode_rgb, image_size):
        with pytest.raises(DecodeError, match=NOT_IMAGES[content]):
            call(content.encode("latin-1"))


def test_reasons_can_be_shown() -> None:
    assert str(DecodeError("chunk \x1b[2J\n\u2028")) == r"chunk \x1b[2J\n\u2028"
    assert len(str(DecodeError("x" * 10**6))) <= 200


def deep(kind: str, order: str) -> bytes:
    gray = np.linspace(0, 65535, 24 * 40).round().astype(order + "u2").reshape(24, 40)
    return encoded(Image.frombytes(kind, (40, 24), gray.tobytes()), "TIFF")


def test_forms_of_pixels() -> None:
    """Each is what Pillow makes of it, or what its numbers say."""
    rgb = odd.photo()
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    frames = [rgb, Image.new("RGB", rgb.size, "red")]
    palette = rgb.quantize(30)
    for data in (
        *(
            encoded(alpha, "PNG"),
            encoded(alpha.convert("LA"), "PNG"),
            encoded(rgb.convert("1"), "PNG"),
        ),
        *(
            encoded(palette, "PNG", transparency=3),
            encoded(palette, "PNG", bits=8, transparency=b"\0a"),
        ),
        *(
            encoded(rgb.convert("L"), "PNG", transparency=7),
            encoded(rgb, "PNG", transparency=(1, 2, 3)),
        ),
        *(encoded(rgb.quantize(4), "PNG", bits=2), encoded(rgb.quantize(12), "PNG", bits=4)),
        *(
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            encoded(palette, "GIF"),
        ),
        *(encoded(rgb.convert(mode), "TIFF") for mode in ("1", "L", "P", "LA", "CMYK", "YCbCr")),
        *(encoded(rgb.convert(mode), "TIFF", compression="packbits") for mode in ("L", "RGB")),
        *(
            encoded(rgb.convert("1"), "TIFF", compression="group4"),
            encoded(rgb, "TIFF", big_tiff=True),
        ),
        *(encoded(rgb.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB")),
        *(encoded(rgb.convert(mode), "PPM") for mode in ("1", "L")),
        *(encoded(rgb.convert(mode), "JPEG2000") for mode in ("L", "RGBA")),
        *(encoded(rgb.convert("CMYK"), "JPEG", progressive=flag) for flag in (False, True)),
        *(encoded(rgb, "JPEG", restart_marker_blocks=2), whole("JPEG") + RANDOM),
        *(encoded(rgb, "JPEG", progressive=True, subsampling=s) for s in (0, 1, 2)),
        encoded(rgb, "MPO", save_all=True, append_images=frames[1:]),
        b"P3 # text\n2 1 255\n1 2 3 250 251 252\n",
        b"P6 2 1 65535\n" + bytes(range(12)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            expected = image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
        assert np.array_equal(decode_rgb(data), np.asarray(expected)), (image.format, image.mode)
    ramp = np.linspace(0, 65535, 24 * 40).reshape(24, 40, 1) / 257
    for data in (deep("I;16", "<"), deep("I;16B", ">")):
        assert np.abs(decode_rgb(data) - ramp).max() <= 0.51
    for width in (1, 7, 40):  # rows of Adam7
        image = rgb.resize((width, 11))
        assert np.array_equal(decode_rgb(interlaced(image)), np.asarray(image))
    wide = np.asarray(rgb).astype(np.uint16) * 256 + 77
    rows = b"".join(b"\0" + row.tobytes() for row in wide.astype(">u2"))
    assert np.array_equal(decode_rgb(odd.png(40, 24, 16, 2, zlib.compress(rows))), np.asarray(rgb))


def interlaced(image: Image.Image) -> bytes:
    """A PNG in the seven passes of Adam7, which Pillow does not write."""
    pixels, rows = np.asarray(image), []
    for x, y, right, down in (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ):
        part = pixels[y::down, x::right]
        rows += [b"\0" + row.tobytes() for row in part if part.shape[1]]
    data = bytearray(odd.png(image.width, image.height, 8, 2, zlib.compress(b"".join(rows))))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_is_turned_by_its_own_property() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(odd.photo(), "AVIF", exif=turned)
    assert np.array_equal(decode_rgb(data), np.rot90(decode_rgb(encoded(odd.photo(), "AVIF")), 3))
    assert image_size(data) == (odd.WIDTH, odd.HEIGHT)


def test_a_hole_in_a_jpeg_of_inks_is_noticed() -> None:
    """Pillow makes gray of it; the strict decoder is asked first."""
    data = encoded(odd.photo().resize((400, 300)).convert("CMYK"), "JPEG", quality=90)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(2000) + data[middle + 2000 :]
    Image.open(io.BytesIO(damaged)).load()
    with pytest.raises(DecodeError, match="broken JPEG"):
        decode_rgb(damaged)


def test_nothing_is_said_on_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """Neither by a warning, nor by Pillow's log, nor by a library of C."""
    code = """
import sys
from moco_scale.data.images.decode import DecodeError, decode_rgb
data = sys.stdin.buffer.read()
while data:
    size = int.from_bytes(data[:4], "big")
    try:
        decode_rgb(data[4 : 4 + size])
    except DecodeError:
        pass
    data = data[4 + size :]
"""
    lzw = encoded(odd.photo(), "TIFF", compression="tiff_lzw")
    samples = tiff_with([])
    at = samples.index(struct.pack("<HHIH", 277, 3, 1, 3))
    images = [
        *(with_exif(place, bad) for place in EXIF_PLACES for bad in BAD_EXIF.values()),
        *(lzw[:200] + RANDOM[:20] + lzw[220:], lzw[: len(lzw) // 2]),
        samples[: at + 8] + b"\x09" + samples[at + 9 :],
        *(encoded(odd.photo(), "TIFF", compression="jpeg")[:cut] for cut in (300, 600, 900)),
        encoded(odd.photo().quantize(4), "PNG", transparency=b"\0a"),
        odd.png(12_000, 12_000, 1, 0, b"x"),
        whole("WEBP")[:60],
        whole("JPEG")[:400],
    ]
    stream = b"".join(struct.pack(">I", len(data)) + data for data in images)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], input=stream, capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert not caplog.records
