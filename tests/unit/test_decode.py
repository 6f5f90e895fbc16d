"""Every kind of image that turns up in real folders, and broken ones."""

import io
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageOps

from moco_scale.data.images.decode import (
    ORIENTATION,
    DecodeError,
    Decoder,
    decode_rgb,
    image_size,
    orientation,
)


def photo(height: int = 37, width: int = 50) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def as_pil_has_it(data: bytes) -> np.ndarray:
    warnings.simplefilter("ignore")  # about transparent palettes; pytest restores it
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def modes() -> dict[str, bytes]:
    rgb = Image.fromarray(photo())
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(17)
    see_through = encoded(palette, "PNG", transparency=bytes(range(0, 170, 10)))
    return {
        "jpeg": encoded(rgb, "JPEG", quality=90),
        "jpeg 4:4:4": encoded(rgb, "JPEG", subsampling=0),
        "progressive jpeg": encoded(rgb, "JPEG", progressive=True),
        "gray jpeg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk jpeg": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb, "PNG"),
        "gray png": encoded(rgb.convert("L"), "PNG"),
        "gray png with alpha": encoded(rgb.convert("LA"), "PNG"),
        "png with alpha": encoded(alpha, "PNG"),
        "palette png": encoded(palette, "PNG"),
        "palette png with transparency": see_through,
        "bilevel png": encoded(rgb.convert("1"), "PNG"),
        "webp": encoded(rgb, "WEBP"),
        "gif": encoded(palette, "GIF"),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF"),
    }


@pytest.mark.parametrize("kind", modes())
def test_decodes_to_the_same_rgb_as_pil(kind: str) -> None:
    data = modes()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode_rgb(data)
    assert pixels.shape == (37, 50, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.array_equal(pixels, as_pil_has_it(data))
    assert np.array_equal(decode_rgb(memoryview(data)), pixels)


def test_inverted_cmyk_of_photoshop_is_not_a_negative() -> None:
    """Adobe's CMYK JPEGs store inverted ink; PIL writes and reads them so."""
    original = photo()
    pixels = decode_rgb(encoded(Image.fromarray(original).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - original).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    deep = np.linspace(0, 65535, 37 * 50).round().astype(np.uint16).reshape(37, 50)
    pixels = decode_rgb(encoded(Image.fromarray(deep), kind))
    assert pixels.shape == (37, 50, 3)
    assert np.abs(pixels.astype(float) - deep[..., None] / 257).max() <= 0.5
    assert pixels.min() == 0
    assert pixels.max() == 255


def test_pixels_without_a_defined_white_are_refused() -> None:
    with pytest.raises(DecodeError, match="white"):
        decode_rgb(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(DecodeError, match="white"):
        decode_rgb(encoded(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    pixels = decode_rgb(data)
    assert pixels.shape == (6, 8, 3)
    assert (pixels[..., 0] > 250).all()
    assert (pixels[..., 2] < 5).all()


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP", "TIFF"])
def test_images_are_upright_as_pil_turns_them(kind: str, turned: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    image = Image.fromarray(photo())
    if kind == "CMYK":
        data = encoded(image.convert("CMYK"), "JPEG", exif=exif)
    else:
        data = encoded(image, kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((50, 37) if turned < 5 else (37, 50))
    for decode in (decode_rgb, Decoder()):
        pixels = decode(data)
        assert np.array_equal(pixels, np.array(expected))
        assert pixels.flags.c_contiguous


def exif_segment(order: str, kind: int, value: int, *, start: int = 8) -> bytes:
    """A JPEG segment whose EXIF has one entry before the orientation."""
    tiff = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, start)
    tiff += struct.pack(order + "H", 2) + struct.pack(order + "HHII", 0x010E, 4, 1, 7)
    tiff += struct.pack(order + "HHI", ORIENTATION, kind, 1)
    tiff += struct.pack(order + ("I" if kind == 4 else "HH"), value, *(() if kind == 4 else (0,)))
    payload = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (b"", 1),
        (exif_segment("<", 3, 6), 6),
        (exif_segment(">", 3, 6), 6),
        (exif_segment(">", 4, 5), 5),
        (b"\xff\xff" + exif_segment("<", 3, 8), 8),  # padding before the marker
        (b"\xff\xfe\x00\x04\xff\xe1" + exif_segment("<", 3, 3), 3),  # after a comment
        (b"\xff\xe1\x00\x08http:/" + exif_segment("<", 3, 3), 3),  # after an APP1 of XMP
        (exif_segment("<", 3, 0), 1),  # some cameras write it
        (exif_segment("<", 3, 9), 1),
        (exif_segment("<", 3, 6, start=5000), 1),  # points outside
        (exif_segment("<", 3, 6)[:-6], 1),  # cut short
        (b"\xff\xe1\x00\x0aExif\0\0??", 1),
    ],
)
def test_orientation_of_a_jpeg(segments: bytes, expected: int) -> None:
    whole = jpeg()
    assert orientation(whole) == 1
    assert orientation(memoryview(whole[:2] + segments + whole[2:])) == expected


def test_four_inks_as_luma_and_chroma() -> None:
    """YCCK, as Photoshop writes it: the same file but for a byte of Adobe's marker."""
    data = bytearray(encoded(Image.fromarray(photo()).convert("CMYK"), "JPEG"))
    data[data.find(b"Adobe") + 11] = 2
    pixels = decode_rgb(bytes(data))
    assert np.array_equal(pixels, as_pil_has_it(bytes(data)))
    assert pixels.std() > 10


def test_lab_is_converted_as_a_colour_space() -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(photo()),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    pixels = decode_rgb(encoded(lab, "TIFF"))
    assert np.abs(pixels.astype(int) - photo()).mean() < 3


def test_what_lies_under_transparency_is_kept() -> None:
    """Alpha is dropped, not blended with a background."""
    pixels = np.full((4, 4, 4), (200, 100, 50, 0), dtype=np.uint8)
    assert (decode_rgb(encoded(Image.fromarray(pixels), "PNG")) == (200, 100, 50)).all()


def test_a_decoder_reuses_its_memory_and_forgets_nothing() -> None:
    decode = Decoder()
    large, small = jpeg(), encoded(Image.fromarray(photo()), "JPEG")
    for data in (small, large, small):
        assert np.array_equal(decode(data), decode_rgb(data))
    first = decode(large)
    assert np.shares_memory(first, decode(small))
    assert not np.shares_memory(decode_rgb(large), decode_rgb(large))


def jpeg(quality: int = 95) -> bytes:
    return encoded(Image.fromarray(photo(200, 300)), "JPEG", quality=quality)


def broken() -> dict[str, bytes]:
    whole = jpeg()
    half = len(whole) // 2
    png = encoded(Image.fromarray(photo()), "PNG")
    return {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "jpeg header alone": whole[:20],
        "three bytes": b"\xff\xd8\xff",
        "truncated jpeg": whole[:half],
        "end of jpeg missing": whole[:-200],
        "half-zeroed jpeg": whole[:half] + bytes(len(whole) - half),
        "truncated png": png[: len(png) // 2],
        "damaged png": png[:100] + bytes(20) + png[120:],
        "truncated webp": encoded(Image.fromarray(photo()), "WEBP")[:60],
    }


@pytest.mark.parametrize("kind", broken())
def test_what_is_not_a_whole_image_is_an_error(kind: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_rgb(broken()[kind])
    assert 3 < len(str(caught.value)) < 300


def before(jpeg: bytes, marker: int, stray: bytes = b"\x00\x01\x02") -> bytes:
    at = jpeg.index(bytes([0xFF, marker]))
    return jpeg[:at] + stray + jpeg[at:]


def jfif(jpeg: bytes, version: bytes) -> bytes:
    at = jpeg.index(b"JFIF\0") + 5
    return jpeg[:at] + version + jpeg[at + 2 :]


def no_coefficients(jpeg: bytes) -> bytes:
    """Its scan says, as some scanners' do, that it holds the coefficients 0 to 0."""
    scan = bytearray(jpeg)
    end = jpeg.index(b"\xff\xda") + 5 + 2 * 3
    assert scan[end : end + 3] == b"\0\x3f\0"
    scan[end + 1] = 0
    return bytes(scan)


ICC = b"\xff\xe2" + struct.pack(">H", 26) + b"ICC_PROFILE\0" + b"\3\2" + b"x" * 10  # part 3 of 2
ODD: dict[str, Callable[[bytes], bytes]] = {
    "stray bytes before the tables": lambda data: before(data, 0xDB),
    "stray bytes and a zero marker before the image": lambda d: before(d, 0xDA, b"ab\xff\0c\xff"),
    "JFIF 2.01": lambda data: jfif(data, b"\2\1"),
    "JFIF 0.00": lambda data: jfif(data, b"\0\0"),
    "an ICC profile in impossible parts": lambda data: before(data, 0xDB, ICC),
    "no coefficients": no_coefficients,
    "all of it": lambda d: no_coefficients(jfif(before(before(d, 0xDB, ICC), 0xDB), b"\2\1")),
    "stray bytes before the end": lambda data: data[:-2] + b"\0\1\2" * 20 + data[-2:],
}


@pytest.mark.parametrize("kind", ODD)
def test_what_libjpeg_only_warns_of_and_does_no_harm(kind: str) -> None:
    """Cameras, scanners and web sites write such files, and every viewer shows them."""
    whole = jpeg()
    odd = ODD[kind](whole)
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(odd, strict=True)
    assert np.array_equal(decode_rgb(odd), decode_rgb(whole))
    assert image_size(odd) == image_size(whole)
    # Damage behind it is still found.
    half = len(odd) // 2
    for damaged in (odd[:half], odd[:half] + bytes(len(odd) - half), odd[: half // 2]):
        with pytest.raises(DecodeError):
            decode_rgb(damaged)


def test_sampling_factors_that_the_strict_decoder_does_not_know() -> None:
    """Three columns of luma to one of chroma; all blocks are flat."""
    whole = bytearray(encoded(Image.new("RGB", (48, 16), (128, 128, 128)), "JPEG", subsampling=0))
    factors = whole.index(b"\xff\xc0") + 11
    assert whole[factors] == 0x11
    whole[factors] = 0x31
    unit = "001010" * 3 + "0000" * 2  # of the standard tables: no difference, no coefficients
    bits = unit * 4
    bits += "1" * (-len(bits) % 8)
    scan = whole.index(b"\xff\xda") + 14
    data = bytes(whole[:scan]) + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg_header(data)
    assert np.array_equal(decode_rgb(data), np.full((16, 48, 3), 128, np.uint8))
    assert image_size(data) == (16, 48)
    with pytest.raises(DecodeError):
        decode_rgb(data[:-6])


def test_an_odd_header_is_turned_upright_all_the_same() -> None:
    image = Image.fromarray(photo(200, 300))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = encoded(image, "JPEG", exif=exif)
    comment = b"\xff\xfe\0\4ab"
    odd = whole[:2] + comment + b"\0\1\2" + whole[2:]
    assert image_size(odd) == image_size(whole) == (300, 200)
    assert np.array_equal(decode_rgb(odd), decode_rgb(whole))


def test_a_hole_between_the_scans_of_a_progressive_image_is_an_error() -> None:
    """All that libjpeg says of it is that there are stray bytes before the next scan."""
    whole = encoded(Image.fromarray(photo(200, 300)), "JPEG", progressive=True)
    second = whole.index(b"\xff\xda", whole.index(b"\xff\xda") + 2)
    first_scan = whole.index(b"\xff\xda") + 20
    hole = whole[:first_scan] + bytes(second - 100 - first_scan) + whole[second - 100 :]
    with pytest.raises(ValueError, match="extraneous bytes before marker"):
        simplejpeg.decode_jpeg(hole, strict=True)
    with pytest.raises(DecodeError):
        decode_rgb(hole)


def test_real_photos_are_those_of_pil(shared_data: Path) -> None:
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        images = [member for member in tar if member.isfile()][::40]
        for member in images:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.lower().endswith((".jpeg", ".jpg", ".png")):
                assert np.array_equal(decode_rgb(data), as_pil_has_it(data)), member.name


def jpeg_bomb(mode: str) -> bytes:
    """A small JPEG whose header declares 50,000 x 50,000 pixels."""
    data = bytearray(encoded(Image.fromarray(photo()).convert(mode), "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 50_000, 50_000)
    return bytes(data)


def png_bomb(side: int) -> bytes:
    """A PNG of so many pixels a side that holds none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("data", [jpeg_bomb("RGB"), jpeg_bomb("CMYK"), png_bomb(50_000)])
def test_a_decompression_bomb_is_refused_before_anything_is_allocated(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="too large: "):
            decode_rgb(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_would_start_another_program_is_no_image() -> None:
    with pytest.raises(DecodeError, match="known format"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
