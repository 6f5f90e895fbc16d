"""Data that goes wrong while it is read: what the user sees, one test for each fault."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import make_shards
from conftest import write_image

from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading.loader import ViewBatch, pretraining_loader
from moco_scale.data.loading.workers import BatchLoader
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.utils.errors import UserError

AUG = AUGMENTATIONS["cifar"]


@pytest.fixture
def shards(tmp_path: Path) -> IndexedShards:
    """24 images of some pages each, 10 to a shard; each test has its own."""
    for i in range(24):
        name = tmp_path / "images" / "train" / "ab"[i % 2] / f"{i:03d}.png"
        write_image(name, seed=i, width=160, height=160)
    return IndexedShards.open(make_shards(tmp_path / "images", tmp_path / "shards"), "train")


def loader(shards: IndexedShards, workers: int, steps: int = 10**6) -> BatchLoader[ViewBatch]:
    plan = BatchPlan(shards.order(0), 8)
    return pretraining_loader(shards, plan, AUG, 16, num_workers=workers, end_step=steps)


def test_a_shard_truncated_under_its_readers_is_named(
    shards: IndexedShards, capfd: pytest.CaptureFixture[str]
) -> None:
    batches = loader(shards, 2)
    for _ in range(6):  # two epochs: both workers have mapped every shard
        next(batches)
    for path in shards.data_dir.glob("train-*.tar"):
        os.truncate(path, 1024)
    with pytest.raises(UserError) as caught:
        list(batches)
    message = str(caught.value)
    assert re.search(
        r"process \d+: SIGBUS, while reading sample \d+, train-00000\d.tar at byte", message
    )
    assert re.search(r"Shard \S+/train-00000\d.tar is truncated: it has 1024 bytes", message)
    assert capfd.readouterr().err == ""  # nothing else that points somewhere else


def test_a_shard_replaced_while_it_is_read_is_read_on_as_it_was(shards: IndexedShards) -> None:
    batches = loader(shards, 1, steps=12)
    for _ in range(3):
        next(batches)
    for path in shards.data_dir.glob("train-*.tar"):
        other = path.with_suffix(".new")
        other.write_bytes(b"other things")
        other.replace(path)
    # What is mapped stays what it was; whoever opens the shards now is told.
    assert sum(len(batch.index) for batch in batches) == 9 * 8
    with pytest.raises(UserError, match=r"train-00000\d.tar is truncated: it has 12 bytes"):
        next(loader(shards, 1))


@pytest.fixture
def few_files() -> Iterator[int]:
    """The limit on open files is where this process stands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(number) for number in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("workers", [0, 1])
def test_exhausted_file_handles_are_named_with_a_remedy(
    shards: IndexedShards, few_files: int, workers: int
) -> None:
    held = [os.dup(0) for _ in range(few_files - len(os.listdir("/proc/self/fd")) + 1)]
    try:
        with pytest.raises(UserError) as caught:
            list(loader(shards, workers))
    finally:
        for number in held:
            os.close(number)
    assert f"may have {few_files} files open (`ulimit -n`)" in str(caught.value)
    assert "oo many open files" in str(caught.value) or "Too many files" in str(caught.value)
