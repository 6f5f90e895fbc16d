"""Which branches an image skips depends on its crop's name and the layer, on nothing else."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from moco_scale.data.sampling.order import Samples
from moco_scale.data.sampling.random import uniforms
from moco_scale.models.encoder import Encoder
from moco_scale.models.stochastic_depth import Crops, encoding

RATES = (0.25, 0.5, 1.0)
SEED = 3


def crops(index: np.ndarray, passes: int = 0, views: tuple[int, ...] = (0,)) -> Crops:
    return Crops(SEED, Samples(index, np.full_like(index, passes)), views)


def tower() -> Encoder:
    """Nothing but stochastic depth for what is positive; its weight says where it computes."""
    return Encoder(nn.Sequential(*(StochasticDepth(p, "row") for p in RATES)), nn.PReLU(), 1)


def factors(
    named: Crops, part: int = 0, parts: int = 1, view: int = 0, encoder: Encoder | None = None
) -> Tensor:
    """[layers, samples of the micro-batch]."""
    encoder = encoder or tower()
    with encoding(named):
        encoder.start_pass(part, parts, view, len(named.views))
    return torch.stack([layer.factors for layer in encoder.drawing])  # type: ignore[misc]


def test_factors_are_the_documented_ones() -> None:
    index = np.arange(1000)
    got = factors(crops(index, passes=2, views=(1,)))
    numbers = uniforms(SEED, 2, index, (1 << 14) + 1, len(RATES)).T
    for row, column, p in zip(got, numbers, RATES, strict=True):
        kept = torch.from_numpy(column >= p)
        assert torch.equal(row, kept * (1 / max(1 - p, 0.1)))
        assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.06)


def test_they_follow_the_sample_through_any_order_and_micro_batch() -> None:
    index = np.random.Generator(np.random.Philox(1)).permutation(64)
    whole = factors(crops(np.arange(64)))
    assert torch.equal(factors(crops(index)), whole[:, index])
    parts = [factors(crops(index), part, 4) for part in range(4)]
    assert torch.equal(torch.cat(parts, 1), whole[:, index])


def test_layers_views_and_passes_differ() -> None:
    index = np.arange(256)
    base = factors(crops(index)) > 0
    assert (base[0] & ~base[1]).any() and (base[1] & ~base[0]).any()
    both = crops(index, views=(0, 1))
    assert torch.equal(factors(both) > 0, base)
    for other in (factors(both, view=1), factors(crops(index, passes=1))):
        assert 0.2 < ((other > 0) ^ base)[1].double().mean() < 0.8


def test_an_image_is_multiplied_by_its_factors() -> None:
    encoder = tower()
    encoder.backbone = nn.Sequential(*list(encoder.backbone.children())[:2])
    wanted = factors(crops(np.arange(8)), encoder=encoder)[:2].prod(0)
    x = torch.rand(8, 2, 3, generator=torch.Generator().manual_seed(0)) + 1
    torch.testing.assert_close(encoder(x), x * wanted.view(8, 1, 1))
    half = encoder.features(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(encoder.eval()(x), x)


def test_unnamed_images_are_an_error_in_training_alone() -> None:
    encoder = tower()
    with pytest.raises(RuntimeError, match="before Encoder"):
        encoder(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="which `encoding` names"):
        encoder.start_pass()
    encoder.eval().start_pass()
    assert torch.equal(encoder(torch.ones(2, 3)), torch.ones(2, 3))
