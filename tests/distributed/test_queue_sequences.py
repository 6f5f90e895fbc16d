"""Random sequences of batches, resumes and numbers of ranks against a plain deque.

The ranks are simulated: each has its queue, and the sums that a reduce-scatter would add are added
here. Real ranks are in test_sharded_queue.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dense_infonce import Ring, compare, enqueue, loss_and_gradient, new_ring
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from moco_scale.methods.infonce import Negatives, Sums, infonce, partial_sums
from moco_scale.methods.key_queue import DTYPES, KeyQueue

DIM, IMAGES, T = 4, 6, 0.1


def unit_rows(count: int, seed: int) -> Tensor:
    rows = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def simulated_loss(
    queues: list[KeyQueue], query: Tensor, positive: Tensor, images: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the ranks together say: they hold parts, and every query meets all parts."""
    parts = [partial_sums(query / T, queue.negatives(), T, images) for queue in queues]
    total = Sums(*(torch.stack(columns).sum(0) for columns in zip(*parts, strict=True)))
    margin = total.exps.log() - (query * positive).sum(1) / T
    mean_key = torch.where(total.exps[:, None] > 0, total.weighted / total.exps[:, None], 0.0)
    gradient = (mean_key - positive) * margin.sigmoid()[:, None] / T
    return F.softplus(margin), gradient


class QueueMachine(RuleBasedStateMachine):
    """A run that is stopped and goes on elsewhere, as often as one likes."""

    ring: Ring
    queues: list[KeyQueue]

    @initialize(
        length=st.integers(1, 24),
        dtype=st.sampled_from(sorted(DTYPES)),
        unfilled=st.booleans(),
        same=st.booleans(),
        world=st.integers(1, 6),
    )
    def begin(self, length: int, dtype: str, unfilled: bool, same: bool, world: int) -> None:
        self.dtype, self.step, self.count = DTYPES[dtype], 0, 0
        self.masks = {"mask_unfilled": unfilled, "mask_same_image": same}
        self.length = length
        self.queues = self.started(world)
        self.ring = new_ring(torch.cat([queue.keys for queue in self.queues]))

    def started(self, world: int) -> list[KeyQueue]:
        return [
            KeyQueue(self.length, DIM, 7, "cpu", dtype=self.dtype, shard=(r, world), **self.masks)
            for r in range(world)
        ]

    @rule(count=st.integers(0, 40))
    def train(self, count: int) -> None:
        """One step with any number of keys."""
        self.step += 1
        keys = unit_rows(count, self.step)
        images = np.random.default_rng(self.step).integers(0, IMAGES, count)
        for queue in self.queues:
            queue.enqueue(keys, images)
        enqueue(self.ring, keys, images.tolist(), self.dtype)
        self.count += count

    @rule(world=st.integers(1, 6))
    def resume(self, world: int) -> None:
        """Save, and go on on any number of ranks."""
        states = [queue.state_dict() for queue in self.queues]
        rows = [name for name in ("keys", "samples") if name in states[0]]
        whole: dict[str, Any] = {name: torch.cat([s[name] for s in states]) for name in rows}
        self.queues = self.started(world)
        for queue in self.queues:
            mine = slice(queue.first, queue.first + len(queue.keys))
            queue.load_state_dict(states[0] | {name: whole[name][mine] for name in rows})

    @invariant()
    def the_ring_is_the_deque(self) -> None:
        keys = torch.cat([queue.keys for queue in self.queues])
        for queue in self.queues:
            assert queue.enqueued == self.count
            assert queue.pointer == self.count % self.length
            assert queue.filled == sum(slot.image >= 0 for slot in self.ring)
        oldest_first = torch.roll(keys, -self.queues[0].pointer, 0).float()
        assert torch.equal(oldest_first, torch.stack([slot.key for slot in self.ring]))

    @rule(count=st.integers(1, 5))
    def loss_is_the_dense_one(self, count: int) -> None:
        query = unit_rows(count, 1000 + self.step)
        positive = F.normalize(unit_rows(count, 2000 + self.step) + query, dim=1)
        images = np.random.default_rng(1000 + self.step).integers(0, IMAGES, count)
        expected = loss_and_gradient(query, positive, images.tolist(), self.ring, T, **self.masks)
        asked = torch.from_numpy(images) if self.masks["mask_same_image"] else None
        compare(*simulated_loss(self.queues, query, positive, asked), expected)
        if len(self.queues) == 1:  # and by the function itself
            q = query.requires_grad_()
            contrast = self.queues[0].contrast(q, positive, T, images)
            (gradient,) = torch.autograd.grad(contrast.loss.sum(), q)
            compare(contrast.loss, gradient, expected)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(
    max_examples=60,
    stateful_step_count=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    count=st.integers(1, 9),
    length=st.integers(0, 600),
    temperature=st.floats(0.03, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_number_of_queries_against_any_number_of_keys(
    count: int, length: int, temperature: float, seed: int
) -> None:
    query, positive = unit_rows(count, seed), unit_rows(count, seed + 1)
    keys = unit_rows(length, seed + 2)
    q = query.clone().requires_grad_()
    contrast = infonce(q, positive, Negatives(keys), temperature)
    (gradient,) = torch.autograd.grad(contrast.loss.sum(), q)
    ring = new_ring(keys)
    expected = loss_and_gradient(query, positive, [0] * count, ring, temperature)
    compare(contrast.loss, gradient * temperature, (expected[0], expected[1] * temperature))
