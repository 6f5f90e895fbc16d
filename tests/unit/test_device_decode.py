"""Decoding on the training device, here a CPU, against what the workers do."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moco_scale.config.resolve import build
from moco_scale.data.images import device_decode
from moco_scale.data.images.augment import Augmentation
from moco_scale.data.images.crop import write_crop
from moco_scale.data.images.decode import decode_rgb, orientation, without_exif
from moco_scale.data.images.device_decode import DeviceDecoder, can_decode, crop_into
from moco_scale.data.loading import loader
from moco_scale.data.loading.loader import ViewBatch, pretraining_loader
from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.shards.protocols import Place
from moco_scale.utils.errors import UserError

AUG = Augmentation(crop_min=0.2)
SIZE = 24
CPU = torch.device("cpu")


def encoded(kind: str = "JPEG", turned: int = 1, mode: str = "RGB", seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((70, 52), Image.Resampling.BICUBIC).convert(mode)
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = turned
    image.save(out, kind, exif=exif)
    return out.getvalue()


def broken(seed: int = 0) -> bytes:
    """Whole at its end, wrong in the middle."""
    data = bytearray(encoded(seed=seed))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd8" * 20
    return bytes(data)


class InMemory:
    """Images of every orientation, of which the device can decode some."""

    name = "memory"

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images
        self.labels = np.arange(len(images), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> memoryview:
        return memoryview(self.images[i])

    def where(self, i: int) -> str:
        return f"image {i}"

    def place(self, i: int) -> Place:
        return Place("memory", i, "")

    def rest(self) -> None: ...

    def remote_parts(self) -> list[RemotePart]:
        return []

    def fault(self, i: int) -> str | None:
        return None

    def remedy(self, i: int) -> str:
        return f"draw image {i} again"

    def checkable(self) -> list[str]:
        return []


MIXED = InMemory(
    [
        *(encoded(turned=turned, seed=turned) for turned in range(1, 9)),
        encoded("PNG", turned=6),
        encoded(mode="CMYK", turned=8),
        encoded(mode="L", turned=3),
        encoded("WEBP"),
    ]
)


def batches(images: InMemory, decoder: DeviceDecoder | None, workers: int = 0) -> list[ViewBatch]:
    plan = BatchPlan(FullPermutation(len(images), 0), 4)
    with pretraining_loader(
        images, plan, AUG, SIZE, num_workers=workers, end_step=6, decoder=decoder
    ) as loader:
        return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_the_workers_but_for_rounding(workers: int) -> None:
    ours, theirs = batches(MIXED, DeviceDecoder(CPU), workers), batches(MIXED, None)
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.labels, b.labels)
        assert a.views.shape == b.views.shape
        assert a.views.dtype == torch.uint8
        difference = (a.views.int() - b.views.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.3
        for row, sample in enumerate(a.index.tolist()):
            if not can_decode(MIXED.read(sample)):
                assert torch.equal(a.views[:, row], b.views[:, row])


def test_what_is_left_to_the_device() -> None:
    whole = encoded()
    assert [can_decode(data) for data in MIXED.images] == [True] * 8 + [False, False, True, False]
    assert can_decode(whole + bytes(100))  # some cameras pad
    for data in (b"", whole[:-20], whole[: len(whole) // 2] + bytes(600) + whole[-2:], whole[:3]):
        assert not can_decode(data)


@pytest.mark.parametrize("turned", [1, 6])
def test_no_decoder_finds_an_orientation(turned: int) -> None:
    data = encoded(turned=turned)
    neutral = without_exif(data)
    assert orientation(neutral) == 1
    assert len(neutral) == len(data)
    assert Image.open(io.BytesIO(neutral)).getexif().get(0x0112, 1) == 1
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_rgb(neutral), stored)


def test_one_bad_image_does_not_take_the_others_with_it() -> None:
    images = InMemory([encoded(seed=i) for i in range(4)])
    decode = DeviceDecoder(CPU)
    strict = decode._decode
    failures: list[int] = []

    def picky(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
        if len(jpegs) > 1 or not failures:
            failures.append(len(jpegs))
            raise RuntimeError("nvJPEG: status 5")
        return strict(jpegs, device)

    decode._decode = picky
    expected = batches(images, DeviceDecoder(CPU))
    for a, b in zip(batches(images, decode), expected, strict=True):
        assert torch.equal(a.views, b.views)
    assert failures


def test_large_images_are_decoded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many pixels at once as are allowed, and never less than one image."""
    images = InMemory([encoded(seed=i) for i in range(4)])
    expected = batches(images, DeviceDecoder(CPU))
    for allowed, group in ((1, 1), (2 * 70 * 52, 2), (3 * 70 * 52, 3)):
        decode, sizes = DeviceDecoder(CPU), list[int]()
        whole = decode._decode

        def counted(
            jpegs: list[Tensor],
            device: torch.device,
            whole: Callable[[list[Tensor], torch.device], list[Tensor]] = whole,
            sizes: list[int] = sizes,
        ) -> list[Tensor]:
            sizes.append(len(jpegs))
            return whole(jpegs, device)

        decode._decode = counted
        monkeypatch.setattr(device_decode, "DEVICE_PIXELS", allowed)
        monkeypatch.setattr(loader, "can_decode", lambda data: True)
        for a, b in zip(batches(images, decode), expected, strict=True):
            assert torch.equal(a.views, b.views)
        assert max(sizes) == group
        assert sum(sizes) == 4 * 6


def test_what_is_too_large_for_the_device_is_left_to_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert can_decode(encoded())
    monkeypatch.setattr(device_decode, "DEVICE_PIXELS", 4 * 70 * 52 - 1)
    assert not can_decode(encoded())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(workers: int) -> None:
    images = InMemory([encoded(seed=1), encoded(seed=2), broken(), encoded(seed=3)])
    assert can_decode(images.read(2))
    with pytest.raises(UserError, match=r"memory, image 2"):
        batches(images, DeviceDecoder(CPU), workers)


@pytest.mark.parametrize(
    "box", [(0, 0, 52, 70), (3, 5, 40, 31), (10, 20, SIZE, SIZE), (1, 2, 9, 7)]
)
def test_crops_in_fp32_are_those_in_whole_numbers(box: tuple[int, int, int, int]) -> None:
    pixels = decode_rgb(encoded())
    ours, theirs = (torch.empty(3, SIZE, SIZE, dtype=torch.uint8) for _ in range(2))
    crop_into(ours, torch.from_numpy(pixels).permute(2, 0, 1), box)
    write_crop(theirs, pixels, box)
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_nearly_what_a_worker_does() -> None:
    ours, theirs = batches(MIXED, DeviceDecoder.on_gpu(torch.device("cuda"))), batches(MIXED, None)
    for a, b in zip(ours, theirs, strict=True):
        assert a.views.device.type == "cuda"
        assert (a.views.cpu().int() - b.views.int()).abs().float().mean() < 2


def test_without_a_gpu_the_flag_is_refused() -> None:
    with pytest.raises(UserError, match=r"--decode gpu needs a GPU"):
        DeviceDecoder.on_gpu(CPU)
    with pytest.raises(UserError, match=r"--cache ram .* --decode"):
        build("v2", {"decode": "gpu", "cache": "ram"})
