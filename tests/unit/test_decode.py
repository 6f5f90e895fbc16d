"""Every kind of picture that turns up in real folders, and broken ones."""

import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_scale.data.decode import DecodeError, decode_rgb


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


def test_the_orientation_in_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode_rgb(encoded(Image.fromarray(photo()), "JPEG", exif=exif)).shape == (37, 50, 3)


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
def test_what_is_not_a_whole_picture_is_an_error(kind: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_rgb(broken()[kind])
    assert 3 < len(str(caught.value)) < 300


def test_stray_bytes_before_a_marker_do_no_harm() -> None:
    """libjpeg warns of them, and many cameras write them."""
    whole = jpeg()
    assert whole.endswith(b"\xff\xd9")
    data = whole[:-2] + b"\x00\x01\x02" + whole[-2:]
    assert np.array_equal(decode_rgb(data), decode_rgb(whole))


def test_real_photos_are_those_of_pil(shared_data: Path) -> None:
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        pictures = [member for member in tar if member.isfile()][::40]
        for member in pictures:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.lower().endswith((".jpeg", ".jpg", ".png")):
                assert np.array_equal(decode_rgb(data), as_pil_has_it(data)), member.name
