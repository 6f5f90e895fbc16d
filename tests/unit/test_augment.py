"""Every operation against torchvision's on PIL images, with the same drawn parameters."""

import dataclasses
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from test_augment_draws import CHAINS
from torch import Tensor

from moco_scale.data.images.augment import (
    AUGMENTATIONS,
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    NO_JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    Augmentation,
    draw_params,
)
from moco_scale.data.images.decode import decode_rgb
from moco_scale.data.images.device_augment import DeviceAugment, StaticAugment
from moco_scale.data.images.pixel_operations import box_reach, box_weights

NO_CHANGE = np.zeros(COLUMNS, dtype=np.float32)
NO_CHANGE[ORDER] = NO_JITTER
NO_CHANGE[[BRIGHTNESS, CONTRAST, SATURATION]] = 1


def pixels_of(aug: Augmentation, crops: Tensor, params: np.ndarray) -> Tensor:
    """What both forms make of crops, in [0, 255], float32 [B, 3, S, S]."""
    grouped, static = (form(aug, (0.0,) * 3, (1.0,) * 3) for form in (DeviceAugment, StaticAugment))
    result = grouped(crops, params)
    assert torch.equal(static(crops, params), result)
    return result * 255


def made_images(count: int = 4, size: int = 64) -> Tensor:
    """Smooth colours with grain and a hard edge, dark, bright and gray ones among them."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
        image = image + rng.normal(0, 10, image.shape)
        image[size // 3 : size // 2, size // 4 :] = rng.integers(0, 256, 3)
        if i == 1:
            image = image * 0.3
        if i == 2:
            image = image.mean(2, keepdims=True).repeat(3, 2) + 40
        crops.append(np.clip(image, 0, 255).astype(np.uint8).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(crops))


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return made_images()


def to_pil(crops: Tensor) -> list[Image.Image]:
    return [TF.to_pil_image(crop) for crop in crops]


def from_pil(images: list[Image.Image]) -> Tensor:
    return torch.stack([TF.pil_to_tensor(image) for image in images]).float()


def mean_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().mean().item()


EVERYTHING = Augmentation(
    0.2,
    jitter=(0.4, 0.4, 0.4, 0.4),
    jitter_p=1.0,
    gray_p=0.5,
    blur_p=0.5,
    flip=0.5,
    solarize_p=0.5,
)
JITTER: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    BRIGHTNESS: TF.adjust_brightness,
    CONTRAST: TF.adjust_contrast,
    SATURATION: TF.adjust_saturation,
    HUE: TF.adjust_hue,
}


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.0, 1.4])
@pytest.mark.parametrize("column", [BRIGHTNESS, CONTRAST, SATURATION])
def test_jitter_factors_act_as_on_pil_images(photos: Tensor, column: int, factor: float) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, column], params[:, ORDER] = factor, 0
    only = [0.0] * 4
    only[column - BRIGHTNESS] = 1.0
    b, c, s, h = only
    ours = pixels_of(Augmentation(0.2, jitter=(b, c, s, h), jitter_p=1), photos, params)
    theirs = from_pil([JITTER[column](image, float(params[0, column])) for image in to_pil(photos)])
    assert mean_difference(ours, theirs) < 0.01  # rounding to 8 bit included; 0.6 would pass
    assert (ours - theirs).abs().max() < 1.01


@pytest.mark.parametrize("turns", [-0.4, -0.1, 0.0, 0.05, 0.333, 0.5])
def test_hue_turns_as_on_pil_images(photos: Tensor, turns: float) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, HUE], params[:, ORDER] = turns, 0
    ours = pixels_of(Augmentation(0.2, jitter=(0, 0, 0, 0.5), jitter_p=1), photos, params)
    theirs = from_pil([TF.adjust_hue(image, float(params[0, HUE])) for image in to_pil(photos)])
    assert mean_difference(ours, theirs) < 0.05


def test_grayscale_is_that_of_pil(photos: Tensor) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, GRAY] = 1
    ours = pixels_of(EVERYTHING, photos, params)
    theirs = from_pil([TF.rgb_to_grayscale(image, 3) for image in to_pil(photos)])
    assert mean_difference(ours, theirs) < 0.001


SIGMAS = [0.1, 0.3, 0.5, 0.7, 3**0.5 / 2, 1.0, 1.05, 1.4, 2**0.5, 1.6, 2.0, 6**0.5, 3.0, 9.0]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_is_that_of_pil_to_the_bit(photos: Tensor, sigma: float) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, SIGMA] = sigma
    extremes = torch.zeros_like(photos)
    extremes[..., ::3] = 255
    aug = dataclasses.replace(EVERYTHING, blur_sigma=(0.1, 10.0))
    for images in (photos, extremes, extremes.mT, 255 - extremes):
        pil = [image.filter(ImageFilter.GaussianBlur(sigma)) for image in to_pil(images)]
        assert torch.equal(pixels_of(aug, images, params).round(), from_pil(pil))


def test_blur_is_that_of_pil_to_the_bit_for_any_sigma(photos: Tensor) -> None:
    sigmas = np.random.default_rng(0).uniform(0.1, 2.0, 64).astype(np.float32)
    params = np.tile(NO_CHANGE, (len(sigmas), 1))
    params[:, SIGMA] = sigmas
    crops = photos.repeat(16, 1, 1, 1)[:64]
    pairs = zip(to_pil(crops), sigmas.tolist(), strict=True)
    pil = from_pil([image.filter(ImageFilter.GaussianBlur(sigma)) for image, sigma in pairs])
    assert torch.equal(pixels_of(EVERYTHING, crops, params).round(), pil)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 3**0.5 / 2, 1.0, 1.05, 1.4, 1.6, 2.0])
def test_blur_is_nearly_that_of_torchvision(photos: Tensor, sigma: float) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, SIGMA] = sigma
    ours = pixels_of(EVERYTHING, photos, params)
    inside = (..., slice(8, -8), slice(8, -8))  # torchvision mirrors the border, PIL repeats it
    torchvisions = TF.gaussian_blur(photos, [25, 25], [sigma, sigma]).float()
    assert mean_difference(ours[inside], torchvisions[inside]) < 0.8


def test_blur_of_the_sigmas_that_are_drawn_is_torchvision_s(photos: Tensor) -> None:
    """Three boxes, as PIL has it, are farthest from a Gaussian where sigma is small."""
    inside, differences = (..., slice(8, -8), slice(8, -8)), []
    for sigma in np.linspace(0.1, 2.0, 20):
        params = np.tile(NO_CHANGE, (len(photos), 1))
        params[:, SIGMA] = sigma
        theirs = TF.gaussian_blur(photos, [25, 25], [float(sigma)] * 2).float()
        ours = pixels_of(EVERYTHING, photos, params)
        differences.append(mean_difference(ours[inside], theirs[inside]))
    assert np.mean(differences) < 0.6


@pytest.mark.parametrize("threshold", [0, 100, 128, 255])
def test_solarize_is_that_of_pil(photos: Tensor, threshold: int) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, SOLARIZE] = 1
    aug = dataclasses.replace(EVERYTHING, solarize_from=threshold)
    theirs = from_pil([ImageOps.solarize(image, threshold) for image in to_pil(photos)])
    assert torch.equal(pixels_of(aug, photos, params).round(), theirs)
    torchvisions = TF.solarize(photos, threshold).float()
    assert torch.equal(theirs, torchvisions)


def test_three_boxes_have_the_variance_drawn() -> None:
    sigmas = np.array([0.1, 0.5, 1.0, 1.5, 2.0, 5.0], dtype=np.float32)
    weights = box_weights(sigmas).astype(np.float64) / 2**24
    distance = np.arange(weights.shape[1])
    assert np.allclose(weights[:, 0] + 2 * weights[:, 1:].sum(1), 1, atol=1e-6)
    assert np.allclose(np.sqrt(3 * 2 * (weights * distance**2).sum(1)), sigmas, rtol=1e-4)
    assert (weights >= 0).all()
    for sigma in np.linspace(0.05, 6, 300, dtype=np.float32):
        alone = box_weights(sigma[None])
        reach = box_reach(float(sigma))
        assert alone.shape == (1, reach + 1)
        assert np.array_equal(box_weights(sigma[None], reach + 2)[:, : reach + 1], alone)
    assert box_weights(np.zeros(1, np.float32), 3).tolist() == [[2**24, 0, 0, 0]]


def test_images_smaller_than_the_blur_are_blurred() -> None:
    params = NO_CHANGE[None].copy()
    params[:, SIGMA] = 2.0
    for height, width in ((2, 1), (1, 3), (4, 5)):
        dot = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        dot[:, :, 0] = 200
        theirs = [image.filter(ImageFilter.GaussianBlur(2.0)) for image in to_pil(dot)]
        assert torch.equal(pixels_of(EVERYTHING, dot, params).round(), from_pil(theirs))


def test_flip_mirrors_left_and_right(photos: Tensor) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[1, FLIP] = 1
    ours = pixels_of(EVERYTHING, photos, params).round().byte()
    assert torch.equal(ours[1], photos[1].flip(2))
    assert torch.equal(ours[0], photos[0])
    assert torch.equal(ours[2:], photos[2:])


def reference_chain(aug: Augmentation, image: Image.Image, row: np.ndarray) -> Image.Image:
    """The official pipelines after their crop, with parameters given."""
    gray = bool(row[GRAY])
    if gray and aug.gray_first:
        image = TF.rgb_to_grayscale(image, 3)
    if row[ORDER] != NO_JITTER:
        for kind in ORDERS[int(row[ORDER])]:
            if aug.jitter[kind]:
                image = JITTER[BRIGHTNESS + kind](image, float(row[BRIGHTNESS + kind]))
    if gray and not aug.gray_first:
        image = TF.rgb_to_grayscale(image, 3)
    if row[SIGMA]:
        image = image.filter(ImageFilter.GaussianBlur(float(row[SIGMA])))
    if row[SOLARIZE]:
        image = ImageOps.solarize(image, aug.solarize_from)
    return TF.hflip(image) if row[FLIP] else image


def chain_difference(aug: Augmentation, view: int, crops: Tensor, seed: int = 0) -> float:
    params = draw_params(aug, seed, 0, np.arange(len(crops)), view)
    aug = aug.of(view)
    ours = pixels_of(aug, crops, params)
    rows = zip(to_pil(crops), params, strict=True)
    return mean_difference(
        ours, from_pil([reference_chain(aug, image, row) for image, row in rows])
    )


@pytest.mark.parametrize(("name", "view"), CHAINS)
def test_whole_chains_are_those_of_the_official_pipelines(
    photos: Tensor, name: str, view: int
) -> None:
    crops = photos.repeat(12, 1, 1, 1)
    assert chain_difference(AUGMENTATIONS[name], view, crops) < 0.1  # 1.3 would pass


@pytest.mark.parametrize(("name", "view"), [("v1", 0), ("v2", 0), ("v3", 0), ("v3", 1)])
def test_whole_chains_on_real_photos(shared_data: Path, name: str, view: int) -> None:
    crops = []
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        for member in [m for m in tar if m.name.endswith(".JPEG")][::50]:
            file = tar.extractfile(member)
            assert file is not None
            image = Image.fromarray(decode_rgb(file.read())).resize((224, 224))
            crops.append(TF.pil_to_tensor(image))
    # 1.3 would pass
    assert chain_difference(AUGMENTATIONS[name], view, torch.stack(crops)) < 0.1


def test_the_order_of_gray_and_jitter_is_the_recipes(photos: Tensor) -> None:
    """A gray image stays gray in either order, but other grays come out."""
    params = np.tile(NO_CHANGE, (len(photos), 1))
    params[:, GRAY], params[:, SATURATION], params[:, ORDER] = 1, 0.2, 0
    params[:, BRIGHTNESS] = 1.4
    first = dataclasses.replace(EVERYTHING, gray_first=True)
    a, b = pixels_of(first, photos, params), pixels_of(EVERYTHING, photos, params)
    assert mean_difference(a, b) > 0.3
    for result, aug in ((a, first), (b, EVERYTHING)):
        theirs = [reference_chain(aug, image, params[0]) for image in to_pil(photos)]
        assert mean_difference(result, from_pil(theirs)) < 0.1


@pytest.mark.parametrize("form", [DeviceAugment, StaticAugment])
@pytest.mark.parametrize(("name", "view"), [("v1", 0), ("v2", 0), ("v3", 1)])
@pytest.mark.parametrize("size", [17, 32, 160])
def test_pixels_do_not_depend_on_the_rest_of_the_batch(
    name: str, view: int, size: int, form: type[DeviceAugment] | type[StaticAugment]
) -> None:
    crops = made_images(24, size)
    samples = np.arange(24)
    aug = AUGMENTATIONS[name].of(view)
    apply = form(aug, (0.48, 0.45, 0.4), (0.22, 0.22, 0.22))
    params = draw_params(aug, 0, 0, samples, view)
    together = apply(crops, params)
    alone = torch.cat([apply(crops[i : i + 1], params[i : i + 1]) for i in samples])
    assert torch.equal(together, alone)
    shuffled = np.random.default_rng(0).permutation(24)
    assert torch.equal(apply(crops[shuffled], params[shuffled]), together[shuffled])
    assert torch.equal(apply(crops[5:16], torch.from_numpy(params[5:16])), together[5:16])


def compiled_form(aug: Augmentation, mean: Sequence[float], std: Sequence[float]) -> StaticAugment:
    return StaticAugment(aug, mean, std, compiled=True)


@pytest.mark.slow
def test_the_compiled_form_gives_the_same_pixels() -> None:
    crops, aug = made_images(6, 24), AUGMENTATIONS["v3"].of(1)
    compiled = compiled_form(aug, (0.0,) * 3, (1.0,) * 3)
    for epoch in range(3):  # one graph for all draws
        params = draw_params(aug, 0, epoch, np.arange(len(crops)), 1)
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            difference = compiled(crops, params) * 255 - pixels_of(aug, crops, params)
        # Where products and sums are fused, a value may end a step beside.
        assert difference.abs().mean() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_pixels_and_nobody_waits_for_it(photos: Tensor) -> None:
    params = draw_params(EVERYTHING, 0, 0, np.arange(len(photos)), 0)
    crops = photos.cuda()
    for form, bound in ((DeviceAugment, 0.01), (StaticAugment, 0.01), (compiled_form, 0.1)):
        apply = form(EVERYTHING, (0.0,) * 3, (1.0,) * 3)
        apply(crops, params)
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu = apply(crops, params)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert mean_difference(on_gpu.cpu() * 255, pixels_of(EVERYTHING, photos, params)) < bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_branch_free_form_can_be_captured_in_a_graph(photos: Tensor) -> None:
    apply = StaticAugment(EVERYTHING, (0.0,) * 3, (1.0,) * 3)
    crops = photos.cuda()
    draws = [draw_params(EVERYTHING, 0, epoch, np.arange(len(photos)), 0) for epoch in range(2)]
    tables = [torch.from_numpy(apply.table(params)).cuda() for params in draws]
    table = tables[0].clone()
    apply.apply(crops, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = apply.apply(crops, table)
    for each in tables:
        table.copy_(each)
        graph.replay()
        assert torch.equal(result, apply.apply(crops, each))


def test_what_nobody_drew_is_not_touched_and_crops_stay_as_they_are(photos: Tensor) -> None:
    before = photos.clone()
    params = draw_params(EVERYTHING, 0, 0, np.arange(len(photos)), 0)
    pixels_of(EVERYTHING, photos, params)
    assert torch.equal(photos, before)
    params = np.tile(NO_CHANGE, (len(photos), 1))
    assert torch.equal(pixels_of(EVERYTHING, photos, params).round(), photos.float())


def test_normalisation_is_torchvisions(photos: Tensor) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = TF.normalize(photos.float() / 255, list(mean), list(std))
    params = np.tile(NO_CHANGE, (len(photos), 1))
    ours = DeviceAugment(AUGMENTATIONS["v2"], mean, std)(photos, params)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=2e-6)


def test_an_empty_batch_is_fine() -> None:
    crops = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    params = draw_params(AUGMENTATIONS["v2"], 0, 0, np.arange(0), 0)
    assert pixels_of(AUGMENTATIONS["v2"], crops, params).shape == (0, 3, 8, 8)


def test_crops_and_parameters_that_do_not_go_together_are_refused(photos: Tensor) -> None:
    params = np.tile(NO_CHANGE, (len(photos), 1))
    with pytest.raises(ValueError, match="do not go with"):
        pixels_of(EVERYTHING, photos, params[:-1])
    with pytest.raises(ValueError, match="do not go with"):
        pixels_of(EVERYTHING, photos.float(), params)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_min": 0.0},
        {"crop_min": 0.5, "crop_max": 0.4},
        {"crop_min": 0.5, "crop_max": 1.5},
        {"crop_min": 0.2, "jitter": (0.4, -0.1, 0.4, 0.1)},
        {"crop_min": 0.2, "jitter": (0.4, 0.4, 0.4, 0.6)},
        {"crop_min": 0.2, "blur_sigma": (0.0, 1.0)},
        {"crop_min": 0.2, "per_view": ({}, {"crop_min": 0.1})},
        {"crop_min": 0.2, "per_view": ({}, {"blur_sigma": (2.0, 1.0)})},
    ],
)
def test_impossible_augmentations_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"crop|jitter|blur"):
        Augmentation(**wrong)  # type: ignore[arg-type]


def test_no_global_generator_is_used(photos: Tensor) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    params = draw_params(EVERYTHING, 0, 0, np.arange(len(photos)), 0)
    pixels_of(EVERYTHING, photos, params)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[index]
