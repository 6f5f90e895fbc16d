"""Crops against torchvision's, on PIL images."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop, Resize

from moco_scale.data.images.crop import (
    CROP_SLOTS,
    CROP_TRIES,
    LEFT,
    TOP,
    Box,
    crop_box,
    write_centre,
    write_crop,
)
from moco_scale.data.sampling.random import uniforms


def draws(n: int) -> list[list[float]]:
    return uniforms(1, 0, np.arange(n), 0, CROP_SLOTS).tolist()


def boxes(
    n: int, height: int, width: int, crop_min: float = 0.2, crop_max: float = 1.0
) -> np.ndarray:
    return np.array([crop_box(u, height, width, crop_min, crop_max) for u in draws(n)])


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed + 1).normal(0, 12, (height, width, 3))
    return np.clip(np.array(image) + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (32, 32), (1, 1), (3, 900)])
def test_boxes_lie_inside_the_image(height: int, width: int) -> None:
    top, left, h, w = boxes(500, height, width, 0.08).T
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width


@pytest.mark.parametrize(("crop_min", "crop_max"), [(0.2, 1.0), (0.08, 1.0), (0.05, 0.3)])
def test_boxes_are_distributed_as_torchvisions(crop_min: float, crop_max: float) -> None:
    """Area, ratio and position by their deciles, in an image where boxes often do not fit."""
    height, width, n = 300, 400, 3000
    image = torch.empty(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [
                RandomResizedCrop.get_params(image, [crop_min, crop_max], [3 / 4, 4 / 3])
                for _ in range(n)
            ]
        )
    ours = boxes(n, height, width, crop_min, crop_max)
    deciles = np.linspace(0.1, 0.9, 9)

    def measures(boxes: np.ndarray) -> np.ndarray:
        top, left, h, w = boxes.T
        middle = (top + h / 2) / height, (left + w / 2) / width
        shares = np.stack([h * w / (height * width), np.log(w / h), *middle])
        return np.quantile(shares, deciles, axis=1)

    scale = np.array([crop_max - crop_min, 2 * math.log(4 / 3), 1, 1])
    assert np.abs((measures(ours) - measures(theirs)) / scale).max() < 0.035


def test_area_is_uniform_and_ratio_log_uniform_where_every_box_fits() -> None:
    _, _, h, w = boxes(4000, 3000, 3000, 0.1, 0.4).T
    area = (h * w / 9e6 - 0.1) / 0.3
    ratio = (np.log(w / h) + math.log(4 / 3)) / (2 * math.log(4 / 3))
    for share in (area, ratio):
        counts = np.histogram(share, bins=10, range=(-0.002, 1.002))[0] / 4000
        assert np.abs(counts - 0.1).max() < 0.025
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.06


def test_positions_reach_both_edges() -> None:
    u = [0.0, 0.5] * CROP_TRIES + [0.0, 0.0]
    for value, edge in ((0.0, 0), (1 - 2.0**-32, 50)):
        u[TOP] = u[LEFT] = value
        assert crop_box(u, 100, 100, 0.25, 1.0) == (edge, edge, 50, 50)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (30, 30, (0, 0, 30, 30))],
)
def test_after_ten_misses_the_largest_box_in_the_middle_is_taken(
    height: int, width: int, box: Box
) -> None:
    always_too_big = [1.0, 0.999] * CROP_TRIES + [0.7, 0.7]
    assert crop_box(always_too_big, height, width, 0.9, 1.0) == box


def test_a_later_try_is_used_when_the_first_does_not_fit() -> None:
    u = [1.0, 0.99, 0.0, 0.5] + [0.0] * (CROP_SLOTS - 4)
    assert crop_box(u, 100, 100, 0.25, 1.0) == (0, 0, 50, 50)


@pytest.mark.parametrize("size", [32, 224])
def test_crops_are_those_of_torchvision_on_pil_images(size: int) -> None:
    pixels = photo(260, 330)
    out = torch.empty(3, size, size, dtype=torch.uint8)
    for box in boxes(8, 260, 330).tolist():
        write_crop(out, pixels, tuple(box))
        theirs = TF.pil_to_tensor(TF.resized_crop(Image.fromarray(pixels), *box, [size, size]))
        difference = (out.int() - theirs.int()).abs().float()
        assert difference.mean() < 0.3
        assert difference.max() <= 2


def test_a_crop_of_the_right_size_is_copied() -> None:
    pixels = photo(40, 50)
    out = torch.empty(3, 32, 32, dtype=torch.uint8)
    write_crop(out, pixels, (3, 5, 32, 32))
    assert np.array_equal(out.permute(1, 2, 0).numpy(), pixels[3:35, 5:37])


@pytest.mark.parametrize(
    ("height", "width", "size", "ratio"),
    [
        (375, 500, 224, 8 / 7),
        (500, 333, 224, 8 / 7),
        (61, 90, 48, 1.0),
        (301, 97, 33, 8 / 7),
        (32, 32, 32, 1.0),
        (17, 400, 32, 8 / 7),
        (38, 32, 16, 1.0),
        (32, 38, 16, 1.0),
    ],
)
def test_centre_is_torchvisions_resize_and_centre_crop(
    height: int, width: int, size: int, ratio: float
) -> None:
    pixels = photo(height, width)
    out = torch.empty(3, size, size, dtype=torch.uint8)
    write_centre(out, pixels, ratio)
    transform = Compose([Resize(round(size * ratio)), CenterCrop(size)])
    theirs = TF.pil_to_tensor(transform(Image.fromarray(pixels)))
    difference = (out.int() - theirs.int()).abs().float()
    assert difference.mean() < 0.3
    assert difference.max() <= 2


def test_a_cifar_image_stays_as_it_is() -> None:
    pixels = photo(32, 32)
    out = torch.empty(3, 32, 32, dtype=torch.uint8)
    write_centre(out, pixels, 1.0)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), pixels)
