"""The ring of keys against a deque, for any length and any batch."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor

from moco_scale.methods import key_queue as module
from moco_scale.methods.key_queue import KeyQueue

DIM = 3


def numbered(first: int, count: int) -> Tensor:
    """Keys that can be told apart: fp32 [count, 3]."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, DIM) + 1000


def oldest_first(queue: KeyQueue) -> list[float]:
    """First component of each key, in the order in which the keys will be replaced."""
    return torch.roll(queue.keys, -queue.pointer, 0)[:, 0].tolist()


def test_it_starts_with_the_documented_random_unit_vectors() -> None:
    queue = KeyQueue(50, 8, 7, "cpu")
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(queue.keys, rows / rows.norm(dim=1, keepdim=True))
    assert queue.keys.dtype == torch.float32
    assert (queue.pointer, queue.enqueued, queue.filled, len(queue)) == (0, 0, 0, 50)
    assert not torch.equal(queue.keys, KeyQueue(50, 8, 8, "cpu").keys)


@pytest.mark.parametrize("length", [1, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 5, 8, 13, 40])
def test_any_batch_against_any_length(length: int, batch: int) -> None:
    queue = KeyQueue(length, DIM, 0, "cpu")
    reference = deque(oldest_first(queue), maxlen=length)
    for step in range(6):
        keys = numbered(step * batch, batch)
        queue.enqueue(keys)
        reference.extend(keys[:, 0].tolist())
        assert oldest_first(queue) == list(reference)
        assert queue.pointer == (step + 1) * batch % length
        assert queue.filled == min((step + 1) * batch, length)


def test_keys_are_written_behind_each_other_and_around_the_end() -> None:
    queue = KeyQueue(5, DIM, 0, "cpu")
    queue.enqueue(numbered(0, 3))
    queue.enqueue(numbered(3, 4))
    # Slots 3 and 4, then 0 and 1: key 2 in slot 2 is now the oldest.
    assert queue.keys[:, 0].tolist() == [1005, 1006, 1002, 1003, 1004]
    assert queue.pointer == 2


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_of_batches(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    length = int(numbers.integers(1, 30))
    queue = KeyQueue(length, DIM, 0, "cpu")
    storage = queue.keys.data_ptr()
    reference = deque(oldest_first(queue), maxlen=length)
    total = 0
    for count in numbers.integers(0, 3 * length, 40).tolist():
        keys = numbered(total, count)
        queue.enqueue(keys)
        reference.extend(keys[:, 0].tolist())
        total += count
        assert oldest_first(queue) == list(reference)
    assert queue.enqueued == total
    assert queue.keys.data_ptr() == storage  # written in place, never replaced


def test_whole_rows_are_kept() -> None:
    queue = KeyQueue(7, 4, 0, "cpu")
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    queue.enqueue(rows)
    assert torch.equal(torch.roll(queue.keys, -queue.pointer, 0), rows[3:])


def test_a_restored_queue_goes_on_at_the_same_slot() -> None:
    queue = KeyQueue(5, DIM, 0, "cpu")
    queue.enqueue(numbered(0, 8))
    saved = {name: tensor.clone() for name, tensor in queue.state_dict().items()}
    restored = KeyQueue(5, DIM, 1, "cpu")
    restored.load_state_dict(saved)
    assert (restored.pointer, restored.enqueued) == (3, 8)
    for q in (queue, restored):
        q.enqueue(numbered(8, 3))
    assert torch.equal(restored.keys, queue.keys)
    assert restored.pointer == queue.pointer == 1
    assert restored.enqueued == queue.enqueued == 11


def test_enqueueing_keeps_no_graph() -> None:
    queue = KeyQueue(4, DIM, 0, "cpu")
    queue.enqueue(torch.ones(2, DIM, requires_grad=True) * 2)
    assert not queue.keys.requires_grad


def test_long_queues_are_drawn_in_pieces_that_make_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = KeyQueue(100, DIM, 0, "cpu").keys
    monkeypatch.setattr(module, "_PIECE", 32)
    assert torch.equal(KeyQueue(100, DIM, 0, "cpu").keys, whole)  # the last piece is short
    shares = [KeyQueue(100, DIM, 0, "cpu", shard=(rank, 7)).keys for rank in range(7)]
    assert {len(keys) for keys in shares} == {14, 15}
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize(("length", "per_step", "steps"), [(12, 4, 0), (12, 4, 2), (10, 4, 7)])
def test_ages_are_those_of_a_deque_of_steps(length: int, per_step: int, steps: int) -> None:
    queue = KeyQueue(length, DIM, 0, "cpu")
    ages: deque[int] = deque(maxlen=length)
    for step in range(steps):
        queue.enqueue(numbered(0, per_step))
        ages.extend([steps - step] * per_step)
    mean, largest = queue.ages(per_step)
    assert (mean, largest) == (float(np.mean(ages)) if ages else 0.0, max(ages, default=0))


def test_keys_in_bf16_are_rounded_once() -> None:
    queue = KeyQueue(5, 4, 0, "cpu", dtype=torch.bfloat16)
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    queue.enqueue(rows)
    assert torch.equal(queue.keys[:3], rows.bfloat16())


def test_images_must_be_told_where_they_are_asked_for() -> None:
    queue = KeyQueue(5, DIM, 0, "cpu", mask_same_image=True)
    with pytest.raises(ValueError, match="needs the keys"):
        queue.enqueue(numbered(0, 2))
    queue.enqueue(numbered(0, 7), np.arange(7))
    assert queue.samples is not None
    assert torch.equal(queue.samples + 1000.0, queue.keys[:, 0])
