"""Epochs, batches and crops are the same for any number of ranks and workers."""

import argparse
import io
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moco_scale.commands import shard
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.images.crop import CROP_SLOTS, crop_box, write_centre, write_crop
from moco_scale.data.images.decode import decode_rgb
from moco_scale.data.loading import workers
from moco_scale.data.loading.loader import (
    ViewBatch,
    evaluation_loader,
    pretraining_loader,
    rank_slice,
)
from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.sampling.random import permutation, uniforms
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.shards.protocols import Place
from moco_scale.utils.errors import UserError

SIZE = 16
AUG = AUGMENTATIONS["cifar"]


class ImagesInMemory:
    """The part of IndexedShards that the reader uses."""

    name = "in-memory"

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count, dtype=np.int32) % 3
        self.images = [self._image(i) for i in range(count)]

    @staticmethod
    def _image(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((24 + seed % 7, 20)).save(out, "PNG")
        return out.getvalue()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> memoryview:
        return memoryview(self.images[i])

    def rest(self) -> None:
        pass

    def remote_parts(self) -> list[RemotePart]:
        return []

    def where(self, i: int) -> str:
        return str(self.place(i))

    def place(self, i: int) -> Place:
        return Place("memory", i, f"image {i}")

    def fault(self, i: int) -> str | None:
        return None

    def remedy(self, i: int) -> str:
        return f"draw image {i} again"

    def checkable(self) -> list[str]:
        return []


@pytest.fixture(scope="module")
def images() -> ImagesInMemory:
    return ImagesInMemory(22)


def global_batches(
    images: ImagesInMemory | IndexedShards,
    plan: BatchPlan,
    world: int,
    workers: int,
    end: int,
    start_method: str | None = None,
) -> list[tuple[int, int, Tensor, Tensor, Tensor]]:
    """The global batches put together from what each rank reads."""
    by_rank: list[list[ViewBatch]] = []
    for rank in range(world):
        with pretraining_loader(
            images,
            plan,
            AUG,
            SIZE,
            rank=rank,
            world=world,
            num_workers=workers,
            end_step=end,
            start_method=start_method,
        ) as loader:
            by_rank.append(list(loader))
    batches = []
    for parts in zip(*by_rank, strict=True):
        assert len({(part.step, part.epoch) for part in parts}) == 1
        batches.append(
            (
                parts[0].step,
                parts[0].epoch,
                torch.cat([part.index for part in parts]),
                torch.cat([part.labels for part in parts]),
                torch.cat([part.views for part in parts], dim=1),
            )
        )
    return batches


def test_the_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    order = FullPermutation(100, 3).epoch(4).index
    assert np.array_equal(order, permutation(100, 3, "epoch order", 4))
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_each_epoch_has_whole_batches_of_distinct_samples() -> None:
    plan = BatchPlan(FullPermutation(22, seed=1), 5)
    assert plan.steps_per_epoch == 4
    left_out = []
    for epoch in range(3):
        steps = range(4 * epoch, 4 * epoch + 4)
        assert {plan.epoch_of(step) for step in steps} == {epoch}
        read = np.concatenate([plan.batch(step).index for step in steps])
        assert np.array_equal(read, plan.order.epoch(epoch).index[:20])
        left_out.append(sorted(set(range(22)) - set(read.tolist())))
    assert len({tuple(samples) for samples in left_out}) > 1  # not always the same ones


def test_ranks_own_contiguous_slices_of_the_global_batch() -> None:
    plan = BatchPlan(FullPermutation(40, 0), 8)
    for world in (1, 2, 4, 8):
        slices = [plan.share(3, rank, world).index for rank in range(world)]
        assert np.array_equal(np.concatenate(slices), plan.batch(3).index)
        assert {len(part) for part in slices} == {8 // world}


def test_impossible_plans_are_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"7 samples .* batch of 8"):
        BatchPlan(FullPermutation(7, 0), 8)
    with pytest.raises(UserError, match="positive"):
        BatchPlan(FullPermutation(7, 0), 0)
    with pytest.raises(UserError, match=r"batch of 8 .* 3 processes"):
        BatchPlan(FullPermutation(40, 0), 8).check_world(3)
    with pytest.raises(UserError, match=r"batch of 8 .* 3 processes"):
        BatchPlan(FullPermutation(40, 0), 8).share(0, 0, 3)


def test_a_plan_for_other_data_is_refused(images: ImagesInMemory) -> None:
    with pytest.raises(ValueError, match="21 samples"):
        pretraining_loader(images, BatchPlan(FullPermutation(21, 0), 4), AUG, SIZE, end_step=1)
    with pytest.raises(UserError, match="3 processes"):
        pretraining_loader(
            images, BatchPlan(FullPermutation(22, 0), 4), AUG, SIZE, world=3, end_step=1
        )


def test_batches_hold_the_documented_crops(images: ImagesInMemory) -> None:
    plan = BatchPlan(FullPermutation(22, seed=9), 4)
    with pretraining_loader(
        images, plan, AUG, SIZE, views=3, num_workers=0, start_step=4, end_step=7
    ) as loader:
        assert len(loader) == 3
        batches = list(loader)
    assert [(batch.step, batch.epoch) for batch in batches] == [(4, 0), (5, 1), (6, 1)]
    for batch in batches:
        samples = plan.batch(batch.step).index
        assert batch.index.dtype == batch.labels.dtype == torch.int64
        assert batch.index.tolist() == samples.tolist()
        assert batch.labels.tolist() == images.labels[samples].tolist()
        assert batch.views.shape == (3, 4, 3, SIZE, SIZE)
        assert batch.views.dtype == torch.uint8
        for view in range(3):
            numbers = uniforms(9, batch.epoch, samples, view, CROP_SLOTS).tolist()
            for i, sample in enumerate(samples):
                pixels = decode_rgb(images.read(sample))
                height, width = pixels.shape[:2]
                expected = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
                box = crop_box(numbers[i], height, width, AUG.crop_min, AUG.crop_max)
                write_crop(expected, pixels, box)
                assert torch.equal(batch.views[view, i], expected)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 3 workers on 2 cores
def test_ranks_and_workers_change_nothing(images: ImagesInMemory, world: int, workers: int) -> None:
    plan = BatchPlan(FullPermutation(22, seed=2), 8)
    expected = global_batches(images, plan, 1, 0, 5)  # two and a half epochs
    got = global_batches(images, plan, world, workers, 5)
    assert len(got) == len(expected) == 5
    for ours, theirs in zip(got, expected, strict=True):
        assert ours[:2] == theirs[:2]
        assert all(torch.equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_restart_reads_what_was_left(images: ImagesInMemory, start: int) -> None:
    plan = BatchPlan(FullPermutation(22, seed=2), 8)
    whole = list(pretraining_loader(images, plan, AUG, SIZE, num_workers=0, end_step=5))
    rest = list(
        pretraining_loader(images, plan, AUG, SIZE, num_workers=2, start_step=start, end_step=5)
    )
    assert [batch.step for batch in rest] == list(range(start, 5))
    for ours, theirs in zip(rest, whole[start:], strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.views, theirs.views)


def test_views_epochs_and_seeds_have_crops_of_their_own(images: ImagesInMemory) -> None:
    def views(seed: int) -> list[tuple[Tensor, Tensor]]:
        loader = pretraining_loader(
            images, BatchPlan(FullPermutation(22, seed), 22), AUG, SIZE, num_workers=0, end_step=2
        )
        return [(batch.views[:, batch.index.argsort()], batch.index) for batch in loader]

    (first, order), (second, other_order) = views(0)
    assert not torch.equal(order, other_order)
    same = [
        (first[0] == first[1]).flatten(1).all(1),
        (first[0] == second[0]).flatten(1).all(1),
        (first[0] == views(1)[0][0][0]).flatten(1).all(1),
    ]
    assert all(which.sum() < 4 for which in same)


def test_one_pool_of_workers_serves_all_epochs(images: ImagesInMemory) -> None:
    plan = BatchPlan(FullPermutation(22, 0), 8)
    before = set(multiprocessing.active_children())
    pools = []
    with pretraining_loader(images, plan, AUG, SIZE, num_workers=2, end_step=7) as loader:
        for batch in loader:
            pools.append({p.pid for p in set(multiprocessing.active_children()) - before})
            if batch.step == 3:
                break
    assert len(pools) == 4
    assert len(pools[0]) == 2
    assert all(pool == pools[0] for pool in pools)
    assert set(multiprocessing.active_children()) == before


def test_a_worker_builds_batches_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not workers.batch_memory((2, 3)).is_shared()
    monkeypatch.setattr(workers, "get_worker_info", object)
    memory = workers.batch_memory((2, 3))
    assert memory.is_shared()
    assert memory.shape == (2, 3)
    assert memory.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pixel_s_colours_lie_together(images: ImagesInMemory, workers: int) -> None:
    """Also after the way from the worker: a copy in another order would cost what it saves."""
    loader = pretraining_loader(
        images, BatchPlan(FullPermutation(22, 0), 8), AUG, SIZE, num_workers=workers, end_step=1
    )
    (batch,) = loader
    assert batch.views.permute(0, 1, 3, 4, 2).is_contiguous()
    assert batch.views.to("cpu", copy=True).stride() == batch.views.stride()  # as to a GPU


def test_a_closed_loader_has_no_batches(images: ImagesInMemory) -> None:
    loader = pretraining_loader(
        images, BatchPlan(FullPermutation(22, 0), 8), AUG, SIZE, num_workers=1, end_step=7
    )
    assert next(loader).step == 0
    loader.close()
    loader.close()
    assert list(loader) == []
    assert multiprocessing.active_children() == []


def test_no_steps_are_no_batches(images: ImagesInMemory) -> None:
    plan = BatchPlan(FullPermutation(22, 0), 8)
    assert list(pretraining_loader(images, plan, AUG, SIZE, start_step=4, end_step=4)) == []


def test_no_global_generator_is_used(images: ImagesInMemory) -> None:
    state = torch.get_rng_state()
    for number in (0, 1):
        list(
            pretraining_loader(
                images,
                BatchPlan(FullPermutation(22, 0), 8),
                AUG,
                SIZE,
                num_workers=number,
                end_step=1,
            )
        )
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("count", "world"), [(22, 1), (22, 3), (2, 4)])
def test_evaluation_reads_every_sample_once_in_order(count: int, world: int) -> None:
    images = ImagesInMemory(count)
    index: list[int] = []
    for rank in range(world):
        with evaluation_loader(
            images, SIZE, 1.25, batch_size=4, rank=rank, world=world, num_workers=rank % 2
        ) as loader:
            batches = list(loader)
        assert len(loader) == len(batches)
        assert [batch.step for batch in batches] == list(range(len(batches)))
        assert all(len(batch.index) == 4 for batch in batches[:-1])
        mine = [i for batch in batches for i in batch.index.tolist()]
        assert mine == list(rank_slice(count, rank, world))
        index += mine
        for batch in batches:
            assert batch.epoch == 0
            assert batch.views.shape == (1, len(batch.index), 3, SIZE, SIZE)
            assert batch.labels.tolist() == images.labels[batch.index.numpy()].tolist()
            for i, crop in zip(batch.index.tolist(), batch.views[0], strict=True):
                expected = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
                write_centre(expected, decode_rgb(images.read(i)), 1.25)
                assert torch.equal(crop, expected)
    assert index == list(range(count))


def test_evaluation_refuses_to_enlarge_the_crop_beyond_the_image() -> None:
    with pytest.raises(ValueError, match="resize_ratio"):
        evaluation_loader(ImagesInMemory(2), SIZE, 0.9, batch_size=2)


MakeShards = Callable[[Path, Path], IndexedShards]


@pytest.fixture
def make_shards() -> MakeShards:
    def make(source: Path, out: Path) -> IndexedShards:
        parser = argparse.ArgumentParser()
        shard.add_arguments(parser)
        command = ["--source", str(source), "--out", str(out), "--workers", "1"]
        shard.run(parser.parse_args([*command, "--shard-size", "10"]))
        return IndexedShards.open(out, "train")

    return make


@pytest.mark.parametrize(
    ("start_method", "world"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)]
)
def test_real_shards_are_read_by_any_number_of_ranks_and_workers(
    image_folder: Path, tmp_path: Path, make_shards: MakeShards, start_method: str, world: int
) -> None:
    shards = make_shards(image_folder, tmp_path / "shards")
    plan = BatchPlan(FullPermutation(len(shards), seed=0), 8)
    alone = global_batches(shards, plan, 1, 0, 4)
    shared = global_batches(shards, plan, world, 1, 4, start_method)
    for ours, theirs in zip(shared, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))
    first_epoch = torch.cat([batch[2] for batch in alone[:3]])
    assert sorted(first_epoch.tolist()) == list(range(24))
    labels = torch.cat([batch[3] for batch in alone[:3]])
    assert torch.bincount(labels).tolist() == [8, 8, 8]


def test_workers_can_start_while_other_threads_run(images: ImagesInMemory) -> None:
    """As they do in training, where gloo, TensorBoard and the progress bar have threads."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        loader = pretraining_loader(
            images, BatchPlan(FullPermutation(22, 0), 8), AUG, SIZE, num_workers=2, end_step=2
        )
        assert len(list(loader)) == 2
    finally:
        stop.set()
        thread.join()
