"""Learning rates against the closed forms of the official codes."""

import itertools
import math

import pytest

from moco_scale.config.resolve import build
from moco_scale.optim.schedules import SCHEDULES, learning_rate

PER_EPOCH = 7


def rates(scheduler: str, epochs: int, base: float = 0.03, **options: float) -> list[float]:
    return [
        learning_rate(
            step,
            base=base,
            scheduler=scheduler,
            steps_per_epoch=PER_EPOCH,
            epochs=epochs,
            **options,  # type: ignore[arg-type]
        )
        for step in range(epochs * PER_EPOCH)
    ]


def recipe_rates(recipe: str, per_epoch: int) -> list[float]:
    """Every rate of a published run, with as many steps in an epoch as it had."""
    config = build(recipe, {})
    optim = config.optim
    return [
        learning_rate(
            step,
            base=config.learning_rate,
            scheduler=optim.lr_scheduler,
            steps_per_epoch=per_epoch,
            epochs=optim.epochs,
            warmup_epochs=optim.warmup_epoch,
            warmup_multiplier=optim.warmup_multiplier,
            minimum=optim.lr_min,
            decay_epochs=optim.lr_decay_epochs,
            decay_rate=optim.lr_decay_rate,
        )
        for step in range(optim.epochs * per_epoch)
    ]


def test_step_is_a_tenth_at_120_and_160() -> None:
    got = recipe_rates("v1", PER_EPOCH)
    for step, rate in enumerate(got):
        epoch = step // PER_EPOCH
        expected = 0.03 if epoch < 120 else 0.003 if epoch < 160 else 0.0003
        assert rate == pytest.approx(expected, rel=1e-12), step


def test_v2_changes_at_each_epoch() -> None:
    got = recipe_rates("v2", PER_EPOCH)
    for step, rate in enumerate(got):
        epoch = step // PER_EPOCH
        assert rate == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)), rel=1e-12)
    assert got[0] == 0.03
    assert got[-1] > 0


def test_the_cifar_demo_counts_epochs_from_one_and_ends_at_zero() -> None:
    got = recipe_rates("cifar10", PER_EPOCH)
    for step, rate in enumerate(got):
        epoch = step // PER_EPOCH + 1
        expected = 0.06 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert got[-PER_EPOCH:] == [0.0] * PER_EPOCH
    assert got[-PER_EPOCH - 1] > 0


def test_cosine_falls_at_each_step() -> None:
    got = rates("cosine", 4, minimum=0.001)
    total = 4 * PER_EPOCH
    for step, rate in enumerate(got):
        expected = 0.001 + 0.029 * 0.5 * (1 + math.cos(math.pi * step / total))
        assert rate == pytest.approx(expected, rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(got))


def test_v1_b1024_warms_up_from_a_hundredth_and_ends_near_a_millionth() -> None:
    per_epoch = 1281167 // 1024
    got = recipe_rates("v1-b1024", per_epoch)
    peak, warm = 0.4, 5 * per_epoch  # 0.1 per 256 images, 1024 images a step
    assert got[0] == pytest.approx(peak / 100, rel=1e-12)
    assert got[warm // 2] == pytest.approx(peak / 100 + (peak - peak / 100) / 2, rel=1e-3)
    assert got[warm] == max(got) == pytest.approx(peak, rel=1e-12)
    rise = got[1] - got[0]
    for step in range(1, warm):
        assert got[step] - got[step - 1] == pytest.approx(rise, rel=1e-6)
    middle = warm + (len(got) - warm) // 2
    assert got[middle] == pytest.approx((peak + 1e-6) / 2, rel=1e-4)
    assert 1e-6 < got[-1] < 1.1e-6


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_warm_up_comes_before_any_schedule(scheduler: str) -> None:
    got = rates(scheduler, 6, base=1.0, warmup_epochs=2, warmup_multiplier=10)
    warm = 2 * PER_EPOCH
    for step in range(warm):
        assert got[step] == pytest.approx(0.1 + 0.9 * step / warm, rel=1e-12)
    if scheduler == "cosine-epoch-end":  # a fourth of the way down at once
        assert got[warm] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)), rel=1e-12)
    else:
        assert got[warm] == 1.0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="triangle"):
        rates("triangle", 1)
