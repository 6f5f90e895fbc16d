"""The chains of augmentations, and what is drawn for a view."""

import dataclasses

import numpy as np
import pytest

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

CHAINS = [
    (name, view) for name, aug in AUGMENTATIONS.items() for view in range(1 + bool(aug.per_view))
]
"""Every chain, and of those whose views differ both."""


def test_recipes_say_what_the_papers_say() -> None:
    strong, weak = (0.4, 0.4, 0.4, 0.4), (0.4, 0.4, 0.4, 0.1)
    expected = {  # crop_min, jitter, jitter_p, gray_p, gray_first, blur_p
        "v1": (0.2, strong, 1.0, 0.2, True, 0.0),
        "v2": (0.2, weak, 0.8, 0.2, False, 0.5),
        "cj": (0.08, strong, 1.0, 0.2, True, 0.0),
        "cifar": (0.08, weak, 0.8, 0.2, False, 0.0),
    }
    for name, row in expected.items():
        a = AUGMENTATIONS[name]
        assert (a.crop_min, a.jitter, a.jitter_p, a.gray_p, a.gray_first, a.blur_p) == row
    for name in ("null", "linear"):
        assert AUGMENTATIONS[name] == Augmentation(crop_min=0.08)
    one, two = AUGMENTATIONS["v3"].of(0), AUGMENTATIONS["v3"].of(1)
    for a in (one, two):
        assert (a.crop_min, a.jitter, a.jitter_p) == (0.2, (0.4, 0.4, 0.2, 0.1), 0.8)
        assert (a.gray_p, a.gray_first) == (0.2, False)
    assert (one.blur_p, one.solarize_p, two.blur_p, two.solarize_p) == (1.0, 0.0, 0.1, 0.2)
    for name, view in CHAINS:
        a = AUGMENTATIONS[name].of(view)
        assert (a.crop_max, a.flip, a.blur_sigma) == (1.0, 0.5, (0.1, 2.0))
        assert a.solarize_from == 128
        assert a.solarize_p == 0 or (name, view) == ("v3", 1)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test at a level of 1e-6: the largest distance of the quantiles."""
    n, place = len(values), (np.sort(values.astype(np.float64)) - low) / (high - low)
    assert -1e-6 < place[0] <= place[-1] < 1 + 1e-6
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - place).max(), (place - steps[:-1]).max())
    assert distance * n**0.5 < 2.7


def assert_share(drawn: np.ndarray, p: float) -> None:
    """At most five standard deviations from the probability."""
    assert set(np.unique(drawn).tolist()) <= {0, 1}
    assert abs(drawn.mean() - p) <= 5 * (p * (1 - p) / len(drawn)) ** 0.5


@pytest.mark.parametrize(("name", "view"), CHAINS)
def test_every_parameter_has_the_distribution_of_its_chain(name: str, view: int) -> None:
    aug = AUGMENTATIONS[name].of(view)
    p = draw_params(AUGMENTATIONS[name], 7, 2, np.arange(40_000), view)
    jittered, blurred = p[:, ORDER] != NO_JITTER, p[:, SIGMA] > 0
    assert_share(p[:, FLIP], aug.flip)
    assert_share(p[:, GRAY], aug.gray_p)
    assert_share(p[:, SOLARIZE], aug.solarize_p)
    assert_share(jittered, aug.jitter_p)
    assert_share(blurred, aug.blur_p)
    for kind, strength in enumerate(aug.jitter):
        column, middle = p[:, BRIGHTNESS + kind], 0.0 if kind == 3 else 1.0
        if strength:
            assert_uniform(column, middle - strength, middle + strength)
        else:
            assert (column == middle).all()
    if blurred.any():
        assert_uniform(p[blurred, SIGMA], *aug.blur_sigma)
    if jittered.any():
        for order in range(len(ORDERS)):
            assert_share(p[jittered, ORDER] == order, 1 / len(ORDERS))


def test_draws_do_not_move_when_the_code_does() -> None:
    """What a run of an earlier version has drawn is what it goes on with."""
    factors = (1.3163608312606812, 0.6650276780128479, 0.9943786263465881, 0.009173993952572346)
    row = draw_params(AUGMENTATIONS["v2"], 1, 2, np.array([1]), 1)[0]
    assert row[:SOLARIZE].tolist() == [0, *factors, 2, 0, 1.5289769172668457]
    assert row[SOLARIZE] == 0


def test_drawn_parameters_are_independent() -> None:
    n = 20_000
    p = draw_params(AUGMENTATIONS["v2"], 0, 3, np.arange(n), 1)
    assert p.shape == (n, COLUMNS)
    assert p.dtype == np.float32
    both = (p[:, ORDER] != NO_JITTER) & (p[:, SIGMA] > 0)
    independent = np.corrcoef(p[both, :SOLARIZE], rowvar=False) - np.eye(SOLARIZE)
    assert np.abs(independent).max() < 0.05


def test_factors_of_strong_jitter_stay_positive() -> None:
    aug = Augmentation(0.2, jitter=(1.5, 0, 0, 0), jitter_p=1)
    factors = draw_params(aug, 0, 0, np.arange(2000), 0)[:, BRIGHTNESS]
    assert factors.min() >= 0
    assert factors.min() < 0.05
    assert factors.max() > 2.45


def test_changing_one_augmentation_leaves_the_other_draws_alone() -> None:
    samples = np.arange(300)
    base = draw_params(AUGMENTATIONS["v2"], 5, 1, samples, 0)
    changed = dataclasses.replace(AUGMENTATIONS["v2"], gray_p=0.9, jitter=(0.4, 0.8, 0.4, 0.1))
    other = draw_params(changed, 5, 1, samples, 0)
    same = [FLIP, BRIGHTNESS, SATURATION, HUE, ORDER, SIGMA]
    assert np.array_equal(base[:, same], other[:, same])
    assert not np.array_equal(base[:, [CONTRAST, GRAY]], other[:, [CONTRAST, GRAY]])


def test_parameters_belong_to_seed_epoch_sample_and_view() -> None:
    v2 = AUGMENTATIONS["v2"]
    samples = np.array([4, 8, 15])
    base = draw_params(v2, 1, 2, samples, 0)
    assert np.array_equal(base[[2, 0]], draw_params(v2, 1, 2, samples[[2, 0]], 0))
    for seed, epoch, view in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not np.array_equal(base, draw_params(v2, seed, epoch, samples, view))
