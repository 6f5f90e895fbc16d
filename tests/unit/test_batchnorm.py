"""Grouped BatchNorm in one process, compared with torch.nn.BatchNorm1d and 2d."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_scale.models.batchnorm import (
    GroupedBatchNorm,
    GroupedBatchNorm1d,
    GroupedBatchNorm2d,
    set_groups,
    set_part,
)
from moco_scale.utils.errors import UserError

CHANNELS = 5
PIXELS = {nn.BatchNorm1d: (), nn.BatchNorm2d: (4, 3)}
"""Dimensions after the channels of what a kind is tested with."""
OURS = {nn.BatchNorm1d: GroupedBatchNorm1d, nn.BatchNorm2d: GroupedBatchNorm2d}
kinds = pytest.mark.parametrize("kind", PIXELS, ids=["1d", "2d"])
affines = pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])


def batch(seed: int, samples: int = 8, pixels: tuple[int, ...] = (4, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, *pixels, generator=generator) * 3 + 1


def norm(kind: type[_BatchNorm], groups: int = 1, affine: bool = True) -> _BatchNorm:
    module = kind(CHANNELS, affine=affine)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
            module.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    if isinstance(module, GroupedBatchNorm):
        module.local_groups = groups
    return module


def backward(module: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a loss that is no symmetric function of the samples."""
    x = x.clone().requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out.float() * weights[: len(x)]).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@kinds
@affines
def test_one_group_is_batchnorm(kind: type[_BatchNorm], affine: bool) -> None:
    ours, reference = norm(OURS[kind], affine=affine), norm(kind, affine=affine)
    for step in range(3):
        x = batch(step, pixels=PIXELS[kind])
        out, grad = backward(ours, x, 100 + step)
        expected, expected_grad = backward(reference, x, 100 + step)
        assert torch.equal(out, expected)
        assert torch.equal(grad, expected_grad)
    for (name, p), (_, q) in zip(
        ours.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad), name
    assert ours.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def in_groups(
    kind: type[_BatchNorm], groups: int, affine: bool, steps: int
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs, input gradients, and the final state, of torch's BatchNorm on each group, in fp64.

    Gradients of parameters are sums over the groups, running statistics means.
    """
    parts = [norm(kind, affine=affine).double() for _ in range(groups)]
    outputs, gradients = [], []
    for step in range(steps):
        x = batch(step, pixels=PIXELS[kind]).double().requires_grad_()
        out = torch.cat([p(c) for p, c in zip(parts, x.chunk(groups), strict=True)])
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        (out * weights).sum().backward()
        assert x.grad is not None
        outputs.append(out.detach())
        gradients.append(x.grad)
    found = {
        name: torch.stack([getattr(p, name) for p in parts]).mean(0)
        for name in ("running_mean", "running_var")
    }
    for name, _ in parts[0].named_parameters():
        found[name] = torch.stack([getattr(p, name).grad for p in parts]).sum(0)
    return outputs, gradients, found


def assert_state(ours: _BatchNorm, found: dict[str, Tensor]) -> None:
    for name, wanted in found.items():
        tensor = getattr(ours, name)
        got = tensor.grad if isinstance(tensor, nn.Parameter) else tensor
        assert got is not None
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@kinds
@affines
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_separate_batchnorms_with_averaged_statistics(
    kind: type[_BatchNorm], affine: bool, groups: int
) -> None:
    ours = norm(OURS[kind], groups, affine)
    outputs, gradients, found = in_groups(kind, groups, affine, 3)
    for step in range(3):
        out, grad = backward(ours, batch(step, pixels=PIXELS[kind]), step)
        torch.testing.assert_close(out.double(), outputs[step], rtol=1e-5, atol=1e-5)
        # Of two numbers in a group all but rounding cancels in the gradient.
        torch.testing.assert_close(grad.double(), gradients[step], rtol=1e-5, atol=5e-5)
    assert_state(ours, found)
    assert ours.num_batches_tracked == 3


@kinds
@pytest.mark.parametrize("groups", [2, 4])
def test_micro_batches_leave_the_statistics_of_whole_steps(
    kind: type[_BatchNorm], groups: int
) -> None:
    """Two micro-batches with a half of the groups each, in every step."""
    ours = norm(OURS[kind], groups // 2)
    _, _, found = in_groups(kind, groups, True, 3)
    for step in range(3):
        x = batch(step, pixels=PIXELS[kind])
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        for part, (rows, each) in enumerate(zip(x.chunk(2), weights.chunk(2), strict=True)):
            set_part(ours, part, 2)
            (ours(rows) * each).sum().backward()
    assert_state(ours, found)
    assert ours.num_batches_tracked == 3


def test_a_group_does_not_see_the_others() -> None:
    ours, x = norm(GroupedBatchNorm2d, 2), batch(0)
    changed = torch.cat([x[:4], x[4:] * 100])
    assert torch.equal(ours(x)[:4], ours(changed)[:4])
    assert not torch.equal(norm(GroupedBatchNorm2d)(x)[:4], norm(GroupedBatchNorm2d)(changed)[:4])


@kinds
@affines
def test_evaluation_uses_the_running_statistics(kind: type[_BatchNorm], affine: bool) -> None:
    ours, reference = norm(OURS[kind], 2, affine), norm(kind, affine=affine)
    ours(batch(0, pixels=PIXELS[kind]))
    reference.load_state_dict(ours.state_dict())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    # An odd batch: groups do not matter here.
    odd = batch(1, 7, PIXELS[kind])
    assert torch.equal(ours.eval()(odd), reference.eval()(odd))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_half_precision_activations(groups: int, parameters: torch.dtype, training: bool) -> None:
    """Engines may cast activations, and parameters too, but never the buffers."""
    ours, reference = norm(GroupedBatchNorm2d, groups), norm(GroupedBatchNorm2d, groups)
    x = batch(0).bfloat16()
    with torch.no_grad():
        for module in (ours, reference):  # so that rounding the parameters changes nothing
            module.weight.copy_(module.weight.bfloat16())
            module.bias.copy_(module.bias.bfloat16())
    ours.weight.data, ours.bias.data = ours.weight.to(parameters), ours.bias.to(parameters)
    ours.train(training)
    reference.train(training)
    out, grad = backward(ours, x, 1)
    expected, expected_grad = backward(reference, x.float(), 1)
    assert out.dtype == grad.dtype == torch.bfloat16
    assert ours.weight.grad is not None and ours.weight.grad.dtype == parameters
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(grad.float(), expected_grad, rtol=2**-6, atol=2**-6)
    for name in ("running_mean", "running_var"):
        assert getattr(ours, name).dtype == torch.float32
        # Statistics are those of the fp32 computation, not rounded to half precision.
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name))


def test_a_batch_that_makes_no_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="7 samples do not make 2"):
        norm(GroupedBatchNorm2d, 2)(batch(0, 7))


@pytest.mark.parametrize(("group_size", "groups"), [(8, 1), (4, 2), (2, 4)])
def test_groups_are_laid_over_the_batch(group_size: int, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), norm(GroupedBatchNorm2d))
    set_groups(model, group_size, batch_size=8)
    assert model[1].local_groups == groups
    assert model[1].span is None


@pytest.mark.parametrize("group_size", [3, 16])
def test_a_group_size_that_does_not_fit_is_refused(group_size: int) -> None:
    words = rf"group of {group_size} \(--bn-group-size\) does not fit 8 images.*these fit: 2, 4, 8"
    with pytest.raises(UserError, match=words):
        set_groups(norm(GroupedBatchNorm2d), group_size, batch_size=8)
