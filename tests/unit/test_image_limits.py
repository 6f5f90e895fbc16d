"""What small files may ask for: memory and time, counted before anything is allocated."""

import io
import re
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import odd_images as odd
import pytest
import torch
from odd_images import chunk, encoded, jpeg_with, png_with, segment, tiff_with, whole
from PIL import Image

from moco_scale.data.images.crop import write_centre
from moco_scale.data.images.decode import DecodeError, decode_rgb, image_size
from moco_scale.data.images.jpeg_header import read_header
from moco_scale.data.images.pil_decode import _BLOCK
from moco_scale.untrusted.limits import IMAGE_MEMORY, IMAGE_PARTS, IMAGE_PIXELS, IMAGE_SCANS

MORE = int(IMAGE_PIXELS**0.5) + 1000
"""A side of a square image that is too large in every form."""


def jpeg_of(width: int, height: int, data: bytes) -> bytes:
    """The same JPEG with another size in its header."""
    found = re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", data)
    assert found
    at = found.start()
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def webp_of(side: int) -> bytes:
    data = whole("WEBP")
    bits = int.from_bytes(data[21:25], "little") & ~0xFFFFFFF
    return data[:21] + (bits | side - 1 | (side - 1) << 14).to_bytes(4, "little") + data[25:]


def tiff_of(side: int, **further: int) -> bytes:
    tags = {"tile_width": 322, "tile_length": 323, "width": 256, "compression": 259}
    data = bytearray(encoded(odd.photo(), "TIFF", compression="tiff_deflate"))
    (start,) = struct.unpack_from("<I", data, 4)
    entries = {256: side, 257: side} | {tags[name]: value for name, value in further.items()}
    (count,) = struct.unpack_from("<H", data, start)
    old = dict(
        (struct.unpack_from("<H", data, at)[0], bytes(data[at : at + 12]))
        for at in range(start + 2, start + 2 + 12 * count, 12)
    )
    old |= {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()}
    directory = b"".join(old[tag] for tag in sorted(old))
    at = len(data) + len(data) % 2
    data[4:8] = struct.pack("<I", at)
    return bytes(data).ljust(at, b"\0") + struct.pack("<H", len(old)) + directory + bytes(4)


BOMBS = {
    "jpeg": jpeg_of(50_000, 50_000, whole("JPEG")),
    "largest jpeg": jpeg_of(65_535, 65_535, whole("JPEG")),
    "gray jpeg": jpeg_of(MORE, MORE, encoded(odd.photo().convert("L"), "JPEG")),
    "progressive jpeg": jpeg_of(MORE, MORE, encoded(odd.photo(), "JPEG", progressive=True)),
    "cmyk jpeg": jpeg_of(MORE, MORE, encoded(odd.photo().convert("CMYK"), "JPEG")),
    **{
        f"png {depth} {colours}": odd.png(MORE, MORE, depth, colours, odd.zeros(1000))
        for depth, colours in ((1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (8, 4), (16, 6))
    },
    "largest png": odd.png(2**31 - 1, 2**31 - 1, 8, 2, b"x"),
    "wide png": odd.png(2**31 - 1, 1, 1, 0, b"x"),
    "tall png": odd.png(1, 2**31 - 1, 1, 0, b"x"),
    "webp": webp_of(16_383),
    "extended webp": odd.webp_with()[:24] + b"\xff" * 6 + odd.webp_with()[30:],
    "gif": whole("GIF")[:6] + b"\xff\xff\xff\xff" + whole("GIF")[10:],
    "bmp": whole("BMP")[:18] + struct.pack("<ii", MORE, -MORE) + whole("BMP")[26:],
    "ppm": b"P6 40000 40000 255\n" + bytes(100),
    "text ppm": b"P3 40000 40000 255\n1 2 3",
    "tiff": tiff_of(MORE),
    "tiff with a huge tile": tiff_of(64, tile_width=2**31 - 16, tile_length=16),
    "tiff with tiles across": tiff_of(60_000, width=1, tile_width=60_000, tile_length=16),
    "jpeg 2000": whole("JPEG2000").replace(struct.pack(">II", 24, 40), b"\0\0\xff\xff" * 2),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("call", [decode_rgb, image_size])
def test_what_would_take_too_much_is_refused_before_it_is_taken(kind: str, call: object) -> None:
    assert callable(call)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="too large: "):
            call(BOMBS[kind])
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "small", [jpeg_of(9000, 9000, whole("JPEG")), odd.png(9000, 9000, 8, 2, b"x")]
)
def test_a_few_bytes_that_cannot_hold_so_many_pixels(small: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="cut short"):
            decode_rgb(small)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


PEAK = """
import re, sys
import numpy as np
from moco_scale.data.images.decode import decode_rgb

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])

data = sys.stdin.buffer.read()
decode_rgb(data[: int(sys.argv[1])])
before = peak()
pixels = decode_rgb(data[int(sys.argv[1]) :])
print(peak() - before, pixels.shape[0] * pixels.shape[1])
"""


@pytest.mark.parametrize("form", ["16 bits", "1 bit", "webp", "gif", "progressive", "turned"])
def test_peaks_are_those_that_are_counted(form: str) -> None:
    """Bytes a pixel of what took most of all, and what of it is held at once."""
    side = 3000
    flat = Image.new("RGB", (side, side), (1, 100, 200))
    turned = Image.Exif()
    turned[0x0112] = 6
    data, small, a_pixel = {
        "16 bits": lambda: (odd.png(side, side, 16, 0, odd.zeros(side * (2 * side + 1))), "PNG", 5),
        "1 bit": lambda: (odd.png(side, side, 1, 0, odd.zeros(side * (side // 8 + 1))), "PNG", 4),
        "webp": lambda: (encoded(flat, "WEBP", lossless=True, quality=0, method=0), "WEBP", 16),
        "gif": lambda: (encoded(flat.convert("P"), "GIF"), "GIF", 4),
        "progressive": lambda: (encoded(flat, "JPEG", progressive=True, subsampling=0), "JPEG", 9),
        "turned": lambda: (encoded(flat, "JPEG", exif=turned), "JPEG", 6),
    }[form]()
    first = whole(small)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(len(first))],
        input=first + data,
        capture_output=True,
        check=True,
    )
    peak, pixels = map(int, done.stdout.split())
    assert pixels == side * side
    assert peak <= a_pixel * pixels + 12 * _BLOCK + (4 << 20)


def test_the_most_that_a_telephone_makes_fits() -> None:
    """200 million pixels, of which here the header alone is looked at."""
    header = read_header(jpeg_of(16_320, 12_240, encoded(odd.photo(), "JPEG")))
    assert 6 * header.width * header.height <= IMAGE_MEMORY
    assert header.working == 0


def test_many_scans_are_refused() -> None:
    data = encoded(odd.photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    several = data[:-2] + scan * 20 + b"\xff\xd9"
    assert np.array_equal(decode_rgb(data + b"\xff\xda" * 1000), decode_rgb(data))
    for more in (
        data[:-2] + scan * IMAGE_SCANS + b"\xff\xd9",
        data[:-2] + (segment(0xFE, b"\xff\xd9") + scan) * IMAGE_SCANS + b"\xff\xd9",
    ):
        with pytest.raises(DecodeError, match=f"more than {IMAGE_SCANS} scans"):
            decode_rgb(more)
    with pytest.raises(DecodeError, match="broken JPEG") as caught:  # it repeats what is there
        decode_rgb(several)
    assert "more than" not in str(caught.value)


def test_many_parts_are_refused() -> None:
    for data in (
        jpeg_with(b"\xff\xfe\0\2" * (IMAGE_PARTS + 1)),
        png_with(chunk(b"tEXt", b"") * (IMAGE_PARTS + 1)),
        odd.webp_with(*[(b"ZZZZ", b"")] * (IMAGE_PARTS + 1)),
        tiff_with([(324, 4, IMAGE_PARTS + 1, bytes(4 * IMAGE_PARTS + 4))]),
    ):
        with pytest.raises(DecodeError, match=f"more than {IMAGE_PARTS:,}"):
            decode_rgb(data)


def test_two_frames_in_a_jpeg() -> None:
    """The second declares another size; libjpeg takes none of them."""
    data = whole("JPEG")
    frame = data[data.index(b"\xff\xc0") :][:19]
    for second in (frame, frame[:5] + b"\xff\xff\xff\xff" + frame[9:]):
        for at in (data.index(b"\xff\xc0"), data.index(b"\xff\xda")):
            with pytest.raises(DecodeError, match=r"broken JPEG|too large"):
                decode_rgb(data[:at] + second + data[at:])


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 9), (9, 0)])
def test_an_image_without_pixels(width: int, height: int) -> None:
    jpeg = jpeg_of(width, height, whole("JPEG"))
    for data in (
        jpeg,
        odd.png(width, height, 8, 2, odd.zeros(10)),
        b"P6 %d %d 255\n" % (width, height),
    ):
        for call in (decode_rgb, image_size):
            with pytest.raises(DecodeError, match="broken"):
                call(data)


def test_deflated_data_behind_the_last_row_is_not_inflated() -> None:
    data = odd.png(10, 10, 8, 0, odd.zeros(300 << 20))
    tracemalloc.start()
    assert not decode_rgb(data).any()
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_conversion_block_by_block_is_that_of_the_whole() -> None:
    """Wider than a block, and of several rows of blocks."""
    wide = np.arange(3 * (_BLOCK + 5), dtype=np.uint32).astype(np.uint8).reshape(1, -1, 3)
    assert np.array_equal(decode_rgb(encoded(Image.fromarray(wide), "PNG")), wide)
    tall = np.random.default_rng(0).integers(0, 256, (2500, 1000), dtype=np.uint8)
    image = Image.fromarray(tall).convert("P")
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_rgb(encoded(image, "PNG", compress_level=1)), expected)


def test_the_evaluation_view_of_a_thread() -> None:
    """Resizing all of it would take 13 GB."""
    thread = np.zeros((1, 65_000, 3), np.uint8)
    thread[:, 32_400:32_600] = 200
    for pixels in (thread, thread.swapaxes(0, 1)):
        out = torch.zeros(3, 32, 32, dtype=torch.uint8)
        write_centre(out, np.ascontiguousarray(pixels), 8 / 7)
        assert (out == 200).all()


def test_frames_within_images_are_bounded_too() -> None:
    """A GIF's first frame may be larger than its screen."""
    gif = whole("GIF")
    at = gif.index(b",", gif.index(b"\0", 13 + 3 * (2 << (gif[10] & 7))))
    larger = gif[: at + 5] + b"\xff\xff\xff\xff" + gif[at + 9 :]
    with pytest.raises(DecodeError):
        decode_rgb(larger)
    icon = io.BytesIO()
    odd.photo().save(icon, "ICO")
    with pytest.raises(DecodeError, match="icon"):
        decode_rgb(icon.getvalue())
