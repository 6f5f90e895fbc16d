"""Grouped BatchNorm in one process, compared with torch.nn.BatchNorm2d."""

import pytest
import torch
from torch import Tensor, nn

from moco_scale.models.batchnorm import GroupedBatchNorm2d, set_groups
from moco_scale.utils.errors import UserError

CHANNELS = 5


def batch(seed: int, samples: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, 4, 3, generator=generator) * 3 + 1


def norm(kind: type[nn.BatchNorm2d], groups: int = 1) -> nn.BatchNorm2d:
    module = kind(CHANNELS)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        module.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    if isinstance(module, GroupedBatchNorm2d):
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


def test_one_group_is_batchnorm() -> None:
    ours, reference = norm(GroupedBatchNorm2d), norm(nn.BatchNorm2d)
    for step in range(3):
        out, grad = backward(ours, batch(step), 100 + step)
        expected, expected_grad = backward(reference, batch(step), 100 + step)
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


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_separate_batchnorms_with_averaged_statistics(groups: int) -> None:
    ours = norm(GroupedBatchNorm2d, groups)
    parts = [norm(nn.BatchNorm2d) for _ in range(groups)]
    for step in range(3):
        x = batch(step)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        ours_x, parts_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = ours(ours_x)
        expected = torch.cat([p(c) for p, c in zip(parts, parts_x.chunk(groups), strict=True)])
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(ours_x.grad, parts_x.grad)
    for name in ("weight", "bias"):
        total = sum(getattr(p, name).grad for p in parts)
        torch.testing.assert_close(getattr(ours, name).grad, total)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(p, name) for p in parts]).mean(0)
        torch.testing.assert_close(getattr(ours, name), mean)
    assert ours.num_batches_tracked == 3


def test_a_group_does_not_see_the_others() -> None:
    ours, x = norm(GroupedBatchNorm2d, 2), batch(0)
    changed = torch.cat([x[:4], x[4:] * 100])
    assert torch.equal(ours(x)[:4], ours(changed)[:4])
    assert not torch.equal(norm(GroupedBatchNorm2d)(x)[:4], norm(GroupedBatchNorm2d)(changed)[:4])


def test_evaluation_uses_the_running_statistics() -> None:
    ours, reference = norm(GroupedBatchNorm2d, 2), norm(nn.BatchNorm2d)
    ours(batch(0))
    reference.load_state_dict(ours.state_dict())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    # An odd batch: groups do not matter here.
    assert torch.equal(ours.eval()(batch(1, 7)), reference.eval()(batch(1, 7)))
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
