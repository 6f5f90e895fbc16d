"""Images of each format with damaged bytes: an image of the declared size, or the one error."""

import itertools
import struct

import numpy as np
import odd_images as odd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_images import encoded, exif, whole
from PIL import features

from moco_scale.data.images import bad_image
from moco_scale.data.images.decode import DecodeError, Decoder, decode_rgb, image_size

SEEDS = {
    "JPEG": [
        whole("JPEG"),
        encoded(odd.photo(), "JPEG", progressive=True),
        encoded(odd.photo().convert("CMYK"), "JPEG"),
        odd.jpeg_with(odd.segment(0xE1, b"Exif\0\0" + exif())),
    ],
    "PNG": [
        whole("PNG"),
        encoded(odd.photo().quantize(9), "PNG"),
        odd.png_with(
            odd.chunk(b"eXIf", exif()) + odd.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0")
        ),
    ],
    "WEBP": [whole("WEBP"), encoded(odd.photo(), "WEBP"), odd.webp_with((b"EXIF", exif()))],
    "TIFF": [
        *(
            odd.tiff_with([(0x0112, 3, 1, b"\6\0\0\0"), (700, 1, 300, odd.ATTRIBUTE)]),
            whole("TIFF"),
        ),
        *(encoded(odd.photo(), "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "packbits")),
        encoded(odd.photo().convert("1"), "TIFF", compression="group4", big_tiff=True),
    ],
    "GIF": [whole("GIF")],
    "BMP": [whole("BMP"), encoded(odd.photo().quantize(9), "BMP")],
    "PPM": [whole("PPM"), b"P3 2 1 255\n1 2 3 250 251 252\n", b"P5 2 2 65535\n" + bytes(8)],
    "JPEG2000": [whole("JPEG2000")],
    **({"AVIF": [whole("AVIF")]} if features.check("avif") else {}),
}
NUMBERS = [
    struct.pack(order + "I", n) for n in (0, 1, 2**31 - 1, 2**32 - 1, 14_000) for order in "<>"
]
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.booleans(),
        st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(NUMBERS)),
    ),
    max_size=6,
)


def damaged(data: bytes, changes: list[tuple[float, bool, bytes]], end: float) -> bytes:
    """Bytes replaced or put in, most of them near the beginning, and what is behind `end` cut."""
    out = bytearray(data)
    for place, replace, new in changes:
        at = int(place**3 * len(out))
        out[at : at + len(new) * replace] = new
    return bytes(out[: int(end * len(out))])


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_an_image_or_the_one_error(kind: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS[kind]))
    end = data.draw(st.one_of(st.just(1.0), st.floats(0, 1)))
    image = damaged(seed, data.draw(CHANGES), end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bad_image, "IMAGE_MEMORY", 20_000_000)
        try:
            pixels = decode_rgb(image)
        except DecodeError as error:
            assert str(error).isprintable()
            assert 3 < len(str(error)) <= 200
            return
        assert image_size(image) == pixels.shape[:2]
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert pixels.flags.c_contiguous
        assert pixels.size <= 20_000_000
        assert np.array_equal(Decoder()(memoryview(image)), pixels)


def test_every_truncation_of_a_header_is_one_error() -> None:
    for kind, seed in itertools.chain(*([(k, s) for s in seeds] for k, seeds in SEEDS.items())):
        for stop in range(min(len(seed) - 1, 200)):
            cut = seed[:stop]
            for call in (decode_rgb, image_size):
                try:
                    call(cut)
                except DecodeError as error:
                    assert str(error).isprintable(), kind
