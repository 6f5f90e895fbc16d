"""Decoding on the training device: workers pass on encoded bytes and the boxes of the crops.

The main process decodes a batch at once with nvJPEG, through torchcodec or torchvision, turns the
images upright, and cuts and resizes the same boxes as a worker would. Workers decode and crop
images that the device cannot decode (such as PNG and CMYK) or that look damaged. On a CPU the same
calls decode with libjpeg, so that all of it can be tested there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.data.images.decode import UPRIGHT, DecodeError, decode_rgb, jpeg_size
from moco_scale.data.images.jpeg_header import HOLE
from moco_scale.untrusted.limits import DEVICE_PIXELS
from moco_scale.utils.errors import UserError


class EncodedViews(NamedTuple):
    """Batch of b images from a worker, n of which the device decodes."""

    data: Tensor
    """uint8, the encoded bytes of the n images, one after the other, without their EXIF."""
    ends: Tensor
    """int64 [n], where each of them ends in `data`."""
    turned: Tensor
    """int64 [n], their orientation, a key of UPRIGHT."""
    pixels: Tensor
    """int64 [n], how many each of them has."""
    rows: Tensor
    """int64 [n], their places in the batch."""
    boxes: Tensor
    """int64 [n, V, 4], (top, left, height, width) of each view in the upright image."""
    others: Tensor
    """int64 [b - n], the places of the others."""
    views: Tensor
    """uint8 [V, b - n, 3, S, S], the others' crops."""


class BadImage(Exception):
    """Image that neither device nor CPU decodes; `row` is its place in the batch."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


def can_decode(data: bytes | memoryview) -> bool:
    """Tell whether the device decodes an image: a JPEG in gray or colour that seems whole.

    nvJPEG decodes even a file whose end is missing or zeros; the CPU's decoder, which gets such
    files, reports the damage.
    """
    try:
        size = jpeg_size(data)
    except DecodeError:
        return False
    if size is None or size[0] * size[1] > DEVICE_PIXELS // 4:  # resized there as fp32
        return False
    whole = bytes(data)
    return whole.rstrip(b"\0").endswith(b"\xff\xd9") and HOLE not in whole.rstrip(b"\0")


class DeviceDecoder:
    """Makes uint8 views [V, b, 3, S, S] on a device from encoded images."""

    def __init__(self, device: torch.device) -> None:
        """Find a decoder. Raises UserError where none is installed."""
        self.device = device
        self._decode = _decoder()

    @classmethod
    def on_gpu(cls, device: torch.device) -> DeviceDecoder:
        """Make a decoder on a GPU. Raises UserError for other devices."""
        if device.type != "cuda":
            raise UserError(
                f"--decode gpu needs a GPU, and this process computes on the {device.type}; leave "
                "--decode out"
            )
        return cls(device)

    def __call__(self, encoded: EncodedViews) -> Tensor:
        """Decode and crop a batch. Raises BadImage for a damaged image."""
        rows, others = encoded.rows.tolist(), encoded.others.to(self.device)
        shape = (len(encoded.views), len(rows) + len(others), *encoded.views.shape[2:])
        views = torch.empty(shape, dtype=torch.uint8, device=self.device)
        views[:, others] = encoded.views.to(self.device, non_blocking=True)
        boxes, turned = encoded.boxes.tolist(), encoded.turned.tolist()
        for i, image in self._images(encoded):
            swap, *flips = UPRIGHT[turned[i]]
            upright = image.swapaxes(1, 2) if swap else image
            axes = [axis for axis, flip in zip((1, 2), flips, strict=True) if flip]
            upright = upright.flip(axes) if axes else upright
            for view, box in zip(views, boxes[i], strict=True):
                crop_into(view[rows[i]], upright, box)
        return views

    def _images(self, encoded: EncodedViews) -> Iterator[tuple[int, Tensor]]:
        """Yield (number, stored pixels uint8 [3, H, W] on the device) of each JPEG."""
        ends, rows = encoded.ends.tolist(), encoded.rows.tolist()
        jpegs = [encoded.data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        for start, stop in _groups(encoded.pixels.tolist()):
            try:
                decoded = self._decode(jpegs[start:stop], self.device)
            except RuntimeError:  # for one of them; which one, it does not say
                group = zip(jpegs[start:stop], rows[start:stop], strict=True)
                decoded = [self._image(jpeg, row) for jpeg, row in group]
            yield from enumerate(decoded, start)

    def _image(self, jpeg: Tensor, row: int) -> Tensor:
        try:
            return self._decode([jpeg], self.device)[0]
        except RuntimeError:
            try:
                pixels = decode_rgb(jpeg.numpy().tobytes())
            except DecodeError as error:
                raise BadImage(row, str(error)) from None
            return torch.from_numpy(pixels).permute(2, 0, 1).to(self.device)


def _groups(pixels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of groups to decode at once: a batch, or less of very large images."""
    start, total = 0, 0
    for i, count in enumerate(pixels):
        if total and total + count > DEVICE_PIXELS:
            yield start, i
            start, total = i, 0
        total += count
    if pixels:
        yield start, len(pixels)


def crop_into(out: Tensor, image: Tensor, box: Sequence[int]) -> None:
    """Crop like `crop.write_crop` on any device.

    In fp32, rounded once, where the CPU's uint8 kernel rounds after each axis: at most 1/255 apart.

    Args:
        out: uint8 [3, S, S].
        image: uint8 [3, H, W].
        box: (top, left, height, width).
    """
    top, left, height, width = box
    region = image[:, top : top + height, left : left + width]
    if region.shape != out.shape:
        resized = F.interpolate(
            region[None].float(), out.shape[1:], mode="bilinear", antialias=True
        )
        region = resized[0].round_().clamp_(0, 255)
    out.copy_(region)


def _decoder() -> Callable[[list[Tensor], torch.device], list[Tensor]]:
    """Find a function (JPEGs as uint8 on the host, device) -> uint8 [3, H, W] each.

    The function raises RuntimeError for a bad one.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except Exception:  # not installed, or older, or without the libraries it needs
        decode_jpeg = None
    if decode_jpeg is not None:
        return lambda jpegs, device: list(decode_jpeg(jpegs, mode="RGB", device=device))
    try:
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as torchvision_decode
    except ImportError:
        raise UserError(
            "--decode gpu: neither torchcodec nor this torchvision decodes JPEG; "
            "`pip install torchcodec`, or leave --decode out"
        ) from None

    def decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
        with warnings.catch_warnings():  # that it will be removed in favour of torchcodec
            warnings.simplefilter("ignore", DeprecationWarning)
            decoded: Any = torchvision_decode(jpegs, ImageReadMode.RGB, device)
        return list(decoded)

    return decode
