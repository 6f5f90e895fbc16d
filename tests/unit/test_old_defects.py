"""Defects that older public implementations of MoCo have: here, each has a test that catches it.

All of them look at real training steps of one process. What more there is to say of the single
parts stands in test_queue, test_infonce, test_checkpoint, test_random and distributed/test_shuffle.
"""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco_scale.checkpoints import checkpoint
from moco_scale.checkpoints.state import save_state
from moco_scale.config.resolve import build
from moco_scale.data.images.augment import draw_params
from moco_scale.data.loading.loader import pretraining_loader
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

BATCH = 8
PER_EPOCH = 4  # of the 32 images


def written(run: Run) -> None:
    """Write a checkpoint to its end."""
    save_state(run, epoch_done=False)
    run.folder.finish_saving()


def start(tiny_shards: Path, out: Path, **values: Any) -> Run:
    """A run of 4 steps an epoch that is set up, or resumed, but has not taken a step."""
    settings: dict[str, Any] = {
        "dataset": "images",
        "data_dir": str(tiny_shards),
        "image_size": 16,
        "model": "resnet18",
        "dim": 32,
        "nce_k": 37,
        "batch_size": BATCH,
        "bn_group_size": 4,
        "epochs": 2,
        "knn_freq": 0,
        "output_dir": str(out),
        "device": "cpu",
    }
    return Run(build("v2", settings | values))


def train(run: Run, steps: int, workers: int = 0) -> None:
    loader = pretraining_loader(
        run.shards,
        run.plan,
        run.inputs.augmentation,
        run.config.data.image_size,
        num_workers=workers,
        start_step=run.step,
        end_step=run.step + steps,
    )
    with loader:
        for batch in loader:
            run.engine.moco.train()
            train_step(run, batch)
            run.step += 1


def global_generators() -> tuple[bytes, ...]:
    states = torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()
    return tuple(pickle.dumps(state) for state in states)


def test_a_step_neither_draws_from_nor_reseeds_the_global_generators(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: torch.manual_seed(epoch) at every step."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a global generator was seeded")

    run = start(tiny_shards, tmp_path)
    torch.rand(3), np.random.rand(3), random.random()
    before = global_generators()
    for module in (torch, torch.random, np.random, random):
        for name in ("manual_seed", "seed"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)
    train(run, PER_EPOCH)
    assert run.step == PER_EPOCH
    assert global_generators() == before


def test_workers_leave_the_global_generators_alone_too(tiny_shards: Path, tmp_path: Path) -> None:
    run = start(tiny_shards, tmp_path)
    before = global_generators()
    train(run, 2, workers=1)
    assert global_generators() == before


def test_each_step_of_an_epoch_has_its_own_permutation(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: one permutation for a whole epoch, because every step reseeded with the epoch."""
    run = start(tiny_shards, tmp_path, symmetric=True)
    orders: list[tuple[int, ...]] = []
    send = run.shuffle.send

    def watched(*args: Any) -> Any:
        exchange = send(*args)
        orders.append(tuple(exchange.received.tolist()))
        return exchange

    monkeypatch.setattr(run.shuffle, "send", watched)
    train(run, 2 * PER_EPOCH)
    assert len(set(orders)) == len(orders) == 2 * 2 * PER_EPOCH
    assert all(sorted(order) == list(range(BATCH)) for order in orders)


def test_ranks_views_and_epochs_augment_differently(tiny_shards: Path, tmp_path: Path) -> None:
    """Defect: the same augmentations on every rank, because all ranks had the same seed."""
    run = start(tiny_shards, tmp_path)
    rows = []
    for epoch in (0, 1):
        for rank in (0, 1):
            mine = run.plan.share(epoch * PER_EPOCH, rank, 2).index
            for view in (0, 1):
                seed = run.config.optim.rng_seed
                rows += list(draw_params(run.inputs.augmentation, seed, epoch, mine, view))
    # Flips and the like are few; brightness, contrast, saturation and hue are not.
    different = {row.tobytes() for row in rows}
    assert len(rows) == 4 * BATCH
    assert len(different) > 0.7 * len(rows)  # a fifth of all draw no jitter, and then look alike


def test_the_queue_its_pointer_and_its_count_survive_a_resume(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Defects: the queue not in the checkpoint at all; its pointer lost on resume."""
    whole = start(tiny_shards, tmp_path / "whole")
    train(whole, 5)

    first = start(tiny_shards, tmp_path / "parts")
    train(first, 3)
    written(first)
    (saved,) = first.folder.checkpoints()
    tensors = checkpoint.load(saved)
    assert torch.equal(tensors["queue.keys"], first.queue.keys)
    assert tensors["queue.pointer"].item() == 3 * BATCH == 24
    assert tensors["queue.enqueued"].item() == 24

    resumed = start(tiny_shards, tmp_path / "parts")
    assert (resumed.step, resumed.queue.pointer, resumed.queue.enqueued) == (3, 24, 24)
    assert torch.equal(resumed.queue.keys, first.queue.keys)
    train(resumed, 2)
    assert resumed.queue.pointer == whole.queue.pointer == 5 * BATCH - 37
    assert torch.equal(resumed.queue.keys, whole.queue.keys)
    for name, tensor in whole.engine.moco.state_dict().items():
        assert torch.equal(resumed.engine.moco.state_dict()[name], tensor), name


class LargestAllocation(TorchDispatchMode):
    """The most elements of any tensor that operators make beside one that is known."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.known:
                self.elements = max(self.elements, t.numel())
        return result


def test_a_step_does_not_copy_the_queue(tiny_shards: Path, tmp_path: Path) -> None:
    """Defect: queue.clone() at every step, because it was changed before backward."""
    run = start(tiny_shards, tmp_path, nce_k=100_003)
    keys = run.queue.keys
    place, version = keys.data_ptr(), keys._version
    with LargestAllocation(keys) as largest:
        train(run, 2)
    assert run.queue.keys is keys and keys.data_ptr() == place
    # Larger than any weight of the ResNet, so that only a copy could be as large.
    assert keys.numel() > 512 * 512 * 9
    assert 0 < largest.elements < keys.numel()
    assert keys._version - version <= 2 * 2  # each step wrote its keys, in two parts at most


@pytest.mark.parametrize("length", [5, 8, 37])
def test_any_queue_length_trains_with_any_batch(
    tiny_shards: Path, tmp_path: Path, length: int
) -> None:
    """Defects: assert K % batch == 0; keys that do not fit dropped."""
    run = start(tiny_shards, tmp_path, nce_k=length)
    train(run, 2)
    assert run.queue.enqueued == 2 * BATCH
    assert run.queue.pointer == 2 * BATCH % length
    assert run.queue.filled == min(2 * BATCH, length)
    means, _ = run.meters.read()
    assert 0 < means["loss"] < 50


class Killed(BaseException):
    """Stands in for a signal: nothing catches it."""


def test_a_run_that_is_stopped_while_saving_goes_on_from_the_checkpoint_before(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: checkpoints written in place, so that a kill destroyed the only one."""
    run = start(tiny_shards, tmp_path)
    train(run, 1)
    written(run)
    model = (tmp_path / "current.pth").read_bytes()
    train(run, 1)
    real = checkpoint.dcp.save

    def stopped_when_written(*args: Any, **keywords: Any) -> None:
        real(*args, **keywords)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", stopped_when_written)
        with pytest.raises(Killed):
            written(run)
    assert [c.name for c in run.folder.checkpoints()] == ["step-00000001"]

    write = torch.save

    def stopped_half_way(value: Any, file: Any) -> None:
        if "current.pth" not in str(getattr(file, "name", "")):
            return write(value, file)
        file.write(b"half a model")
        raise Killed

    resumed = start(tiny_shards, tmp_path)
    assert resumed.step == 1
    train(resumed, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stopped_half_way)
        with pytest.raises(Killed):
            written(resumed)
    assert (tmp_path / "current.pth").read_bytes() == model
    again = start(tiny_shards, tmp_path)
    assert again.step == 2
    train(again, 1)
    written(again)
    assert torch.load(tmp_path / "current.pth", weights_only=True)["step"] == 3
