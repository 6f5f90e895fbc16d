"""InfoNCE equals cross entropy over concatenated logits, without ever making them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco_scale.methods import infonce as module
from moco_scale.methods.infonce import MIN_TEMPERATURE, Negatives, infonce

DIM = 16


def unit_rows(count: int, seed: int, dim: int = DIM) -> Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def reference(
    query: Tensor, positive: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], its gradient for the weights 1, 2, ..., and the positive's probability, in fp64."""
    q = query.detach().double().requires_grad_()
    k, negatives = positive.double(), queue.double()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")
    (gradient,) = torch.autograd.grad((loss * weights(len(q)).double()).sum(), q)
    return loss.detach(), gradient, logits.softmax(1)[:, 0].detach()


def weights(count: int) -> Tensor:
    return torch.arange(1.0, count + 1)


def close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=1e-6)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


# With 2^10 elements, a block is max(2^10 / N, 256) keys: these lengths are less than one block,
# one block, a multiple of it, and neither.
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 2500), (2, 512), (3, 1000), (4, 512), (32, 777)])
def test_loss_and_gradient_equal_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, n: int, k: int, temperature: float
) -> None:
    monkeypatch.setattr(module, "_BLOCK_CPU", 1 << 10)
    query, positive, queue = unit_rows(n, 1), unit_rows(n, 2), unit_rows(k, 3)
    # Half of the keys resemble their query, as they do in training.
    positive[::2] = F.normalize(positive[::2] + 3 * query[::2], dim=1)
    query.requires_grad_()
    contrast = infonce(query, positive, Negatives(queue), temperature)
    (contrast.loss * weights(n)).sum().backward()
    loss, gradient, probability = reference(query, positive, queue, temperature)
    assert query.grad is not None
    assert contrast.loss.dtype == torch.float32 and contrast.loss.shape == (n,)
    close(contrast.loss, loss, 1e-6)
    # One logit, of up to 1 / T, is known to 1e-6 at T = 0.07; over many they even out.
    assert relative(query.grad, gradient) < (1e-6 if n > 1 else 4e-6)
    close(contrast.positive_probability, probability, 1e-6)
    assert not contrast.positive_probability.requires_grad


def test_a_positive_equal_to_its_query_is_exact_at_the_smallest_temperature() -> None:
    query = unit_rows(4, 1)
    queue = -query[:1].expand(300, -1).contiguous()  # the smallest exponentials there can be
    q = query.clone().requires_grad_()
    contrast = infonce(q, query, Negatives(queue), MIN_TEMPERATURE)
    contrast.loss.sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()
    loss, _, probability = reference(query, query, queue, MIN_TEMPERATURE)
    close(contrast.loss, loss, 1e-5)
    close(contrast.positive_probability, probability, 1e-6)


def test_the_gradient_keeps_its_digits_where_the_positive_has_all_the_weight() -> None:
    query, positive, queue = unit_rows(1, 1), unit_rows(1, 2), unit_rows(1, 3)
    positive = F.normalize(positive + 3 * query, dim=1)
    query.requires_grad_()
    contrast = infonce(query, positive, Negatives(queue), 0.07)
    contrast.loss.sum().backward()
    _, gradient, probability = reference(query, positive, queue, 0.07)
    assert probability.item() > 0.99999  # softmax - 1 in fp32 would be known to 1e-2 only
    assert query.grad is not None
    assert relative(query.grad, gradient) < 1e-5


def test_a_query_opposite_to_its_positive_stays_finite() -> None:
    query = unit_rows(2, 1)
    queue = unit_rows(300, 2)
    contrast = infonce(query, -query, Negatives(queue), 0.07)
    loss, _, _ = reference(query, -query, queue, 0.07)
    close(contrast.loss, loss, 1e-6)


def test_chance_is_the_logarithm_of_all_keys() -> None:
    key = unit_rows(1, 1)
    contrast = infonce(key, key, Negatives(key.expand(99, -1)), 0.07)
    assert contrast.loss.item() == pytest.approx(math.log(100), rel=1e-6)


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operators make, other than views of what is known."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return result


def test_nothing_of_the_logits_size_is_made_and_the_queue_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = 1 << 12
    monkeypatch.setattr(module, "_BLOCK_CPU", block)
    n, k = 8, 5000
    query, positive, queue = unit_rows(n, 1).requires_grad_(), unit_rows(n, 2), unit_rows(k, 3)
    version, before = queue._version, queue.clone()
    saved: list[Tensor] = []

    def remember(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with Allocations(query, positive, queue) as allocations:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            loss = infonce(query, positive, Negatives(queue), 0.2).loss.mean()
        loss.backward()
    assert n * DIM <= allocations.largest <= block < min(n * k, k * DIM)
    # Nothing that backward keeps grows with the queue, so the queue may change before backward.
    assert max(t.untyped_storage().nbytes() for t in saved) <= 4 * n * DIM
    assert queue._version == version
    assert torch.equal(queue, before)


def test_autocast_leaves_it_in_fp32() -> None:
    query, positive, queue = unit_rows(4, 1), unit_rows(4, 2), unit_rows(600, 3)
    expected = query.clone().requires_grad_()
    got = query.clone().requires_grad_()
    plain = infonce(expected, positive, Negatives(queue), 0.07)
    plain.loss.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        contrast = infonce(got, positive, Negatives(queue), 0.07)
        loss = contrast.loss.sum()
    loss.backward()
    assert contrast.loss.dtype == torch.float32
    assert torch.equal(contrast.loss, plain.loss)
    assert got.grad is not None and expected.grad is not None
    assert torch.equal(got.grad, expected.grad)


def test_no_gradient_reaches_the_keys() -> None:
    positive = unit_rows(4, 2).requires_grad_()
    query = unit_rows(4, 1).requires_grad_()
    infonce(query, positive, Negatives(unit_rows(50, 3)), 0.1).loss.sum().backward()
    assert positive.grad is None
    assert query.grad is not None


@pytest.mark.parametrize("temperature", [0.0, -0.1, MIN_TEMPERATURE * 0.99])
def test_a_temperature_too_small_for_fp32_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"is below 0\.025"):
        infonce(unit_rows(1, 1), unit_rows(1, 2), Negatives(unit_rows(3, 3)), temperature)
