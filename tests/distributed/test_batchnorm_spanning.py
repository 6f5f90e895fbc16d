"""BatchNorm groups that span several processes equal one process's BatchNorm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_ranks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_scale.distributed import collectives
from moco_scale.models.batchnorm import GroupedBatchNorm1d, GroupedBatchNorm2d, set_groups
from moco_scale.utils.errors import UserError

SAMPLES, CHANNELS, STEPS = 8, 3, 2


class Kind(NamedTuple):
    """A BatchNorm of ours, torch's, the dimensions after the channels, whether it has weights."""

    ours: type[_BatchNorm]
    torchs: type[_BatchNorm]
    pixels: tuple[int, ...]
    affine: bool = True


MAPS = Kind(GroupedBatchNorm2d, nn.BatchNorm2d, (3, 2))
KINDS = (
    MAPS,
    MAPS._replace(affine=False),
    Kind(GroupedBatchNorm1d, nn.BatchNorm1d, ()),
    Kind(GroupedBatchNorm1d, nn.BatchNorm1d, (), affine=False),
)


class Outcome(NamedTuple):
    outputs: list[Tensor]
    input_gradients: list[Tensor]
    weight_gradient: Tensor  # zeros where there are none
    bias_gradient: Tensor
    running_mean: Tensor
    running_var: Tensor


def data(step: int, offset: float, pixels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Global batch and the loss's weights: fp64 [8, 3, *pixels] each."""
    generator = torch.Generator().manual_seed(step)
    shape = (SAMPLES, CHANNELS, *pixels)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + offset
    return x, torch.randn(shape, generator=generator, dtype=torch.float64)


def prepare(module: _BatchNorm) -> None:
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
            module.bias.copy_(torch.linspace(-1, 1, CHANNELS))


def train(
    module: _BatchNorm, part: slice, offset: float, dtype: torch.dtype, pixels: tuple[int, ...]
) -> Outcome:
    outputs, gradients = [], []
    for step in range(STEPS):
        x, weights = (t[part] for t in data(step, offset, pixels))
        x = x.to(dtype).requires_grad_()
        out = module(x)
        (out.to(weights.dtype) * weights).sum().backward()
        assert x.grad is not None
        outputs.append(out.detach())
        gradients.append(x.grad)
    of_weights = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(of_weights) == 2 * module.affine
    assert module.running_mean is not None and module.running_var is not None
    weight, bias = of_weights or [torch.zeros_like(module.running_mean)] * 2
    return Outcome(outputs, gradients, weight, bias, module.running_mean, module.running_var)


def one_rank(
    group_size: int, offset: float, dtype: torch.dtype, kinds: tuple[Kind, ...] = (MAPS,)
) -> list[Outcome]:
    return [_one_rank(kind, group_size, offset, dtype) for kind in kinds]


def _one_rank(kind: Kind, group_size: int, offset: float, dtype: torch.dtype) -> Outcome:
    module = kind.ours(CHANNELS, affine=kind.affine)
    prepare(module)
    set_groups(module, group_size, SAMPLES)
    per_rank = SAMPLES // collectives.world_size()
    part = slice(collectives.rank() * per_rank, (collectives.rank() + 1) * per_rank)
    outcome = train(module, part, offset, dtype, kind.pixels)
    # As whenever a checkpoint or an evaluation needs the statistics.
    collectives.average_([outcome.running_mean, outcome.running_var])
    return outcome


def one_process(group_size: int, offset: float, kind: Kind = MAPS) -> Outcome:
    """A plain BatchNorm for each group, in fp64."""
    groups = []
    for start in range(0, SAMPLES, group_size):
        module = kind.torchs(CHANNELS, affine=kind.affine).double()
        prepare(module)
        part = slice(start, start + group_size)
        groups.append(train(module, part, offset, torch.float64, kind.pixels))
    return Outcome(
        [torch.cat(parts) for parts in zip(*(g.outputs for g in groups), strict=True)],
        [torch.cat(parts) for parts in zip(*(g.input_gradients for g in groups), strict=True)],
        torch.stack([g.weight_gradient for g in groups]).sum(0),
        torch.stack([g.bias_gradient for g in groups]).sum(0),
        torch.stack([g.running_mean for g in groups]).mean(0),
        torch.stack([g.running_var for g in groups]).mean(0),
    )


def close(actual: Any, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


# 2 on 4 ranks: a group is one rank's batch; 2 on 2 ranks: two groups in each; the others span.
@pytest.mark.parametrize(("world", "group_size"), [(2, 8), (4, 8), (4, 4), (4, 2), (2, 2)], ids=str)
def test_groups_of_any_size_equal_one_process(world: int, group_size: int) -> None:
    found = run_ranks(one_rank, world, group_size, 1.0, torch.float32, KINDS)
    for kind, ranks in zip(KINDS, zip(*found, strict=True), strict=True):
        assert_same(ranks, one_process(group_size, 1.0, kind))


def assert_same(ranks: Sequence[Outcome], expected: Outcome) -> None:
    for step in range(STEPS):
        close(torch.cat([r.outputs[step] for r in ranks]), expected.outputs[step])
        gradients = torch.cat([r.input_gradients[step] for r in ranks])
        # Of two numbers in a group all but rounding cancels in the gradient.
        close(gradients, expected.input_gradients[step], atol=5e-5)
    # Each rank has its own samples' share of the parameters' gradients.
    close(sum(r.weight_gradient for r in ranks), expected.weight_gradient)
    close(sum(r.bias_gradient for r in ranks), expected.bias_gradient)
    for rank in ranks:
        close(rank.running_mean, expected.running_mean)
        close(rank.running_var, expected.running_var)


def test_half_precision_activations_keep_fp32_statistics() -> None:
    ranks = [rank for (rank,) in run_ranks(one_rank, 2, SAMPLES, 1.0, torch.bfloat16)]
    expected = one_process(SAMPLES, 1.0)
    for rank in ranks:
        assert rank.outputs[0].dtype == rank.input_gradients[0].dtype == torch.bfloat16
        assert rank.running_mean.dtype == torch.float32
        # Rounding the inputs moves their mean by much less than rounding the mean itself might.
        close(rank.running_mean, expected.running_mean, rtol=2e-3, atol=1e-3)
    close(torch.cat([r.outputs[0] for r in ranks]), expected.outputs[0], 2e-2, 2e-2)


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    # E[x^2] - E[x]^2 in fp32 would leave no correct digit of the variance here.
    offset = 10000.0
    ranks = [rank for (rank,) in run_ranks(one_rank, 2, SAMPLES, offset, torch.float32)]
    expected = one_process(SAMPLES, offset)
    close(torch.cat([r.outputs[0] for r in ranks]), expected.outputs[0], 1e-2, 1e-2)
    close(ranks[0].running_var, expected.running_var, rtol=1e-3)


def refused(group_size: int) -> str:
    with pytest.raises(UserError) as error:
        set_groups(GroupedBatchNorm2d(CHANNELS), group_size, SAMPLES)
    return str(error.value)


def test_a_group_that_neither_splits_nor_spans_ranks_is_refused() -> None:
    messages = run_ranks(refused, 4, 6)
    assert len(set(messages)) == 1
    assert (
        "group of 6 (--bn-group-size) does not fit 2 images on each of 4 processes" in messages[0]
    )
    assert messages[0].endswith("these fit: 2, 4, 8")
