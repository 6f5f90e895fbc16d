"""Very many shards, one shard, one sample, too few samples for a batch."""

import io
import os
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import forked, make_shards
from conftest import write_image
from PIL import Image

from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading.loader import pretraining_loader
from moco_scale.data.open import open_shards
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.utils.errors import UserError

MANY = 10_000


def one_image() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 20, 100)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def few_handles() -> Iterator[int]:
    """As many open files as there are, and 200 more; gives the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_shards_are_read_with_few_file_handles(
    tmp_path: Path, few_handles: int
) -> None:
    image = one_image()
    info = tarfile.TarInfo("0.jpg")
    info.size = len(image)
    body = image + bytes(-len(image) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
    shard = info.tobuf(tarfile.USTAR_FORMAT) + body
    for number in range(MANY):
        (tmp_path / f"{number:05d}.tar").write_bytes(shard)
    shards = open_shards(f"{tmp_path}/{{00000..{MANY - 1:05d}}}.tar", "train")
    assert len(shards) == MANY
    plan = BatchPlan(shards.order(0), 500)
    seen: list[int] = []
    for step in range(plan.steps_per_epoch):
        for sample in plan.batch(step).index.tolist():
            assert bytes(shards.read(sample)) == image
            seen.append(sample)
    assert sorted(seen) == list(range(MANY))
    assert len(os.listdir("/proc/self/fd")) < few_handles - 100
    assert isinstance(shards, IndexedShards)
    with pytest.raises(UserError, match=r"names 10001 shards, of which 1 are missing"):
        open_shards(f"{tmp_path}/{{00000..{MANY:05d}}}.tar", "train")


def test_one_shard_of_one_sample(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "only.png", seed=1)
    shards = open_shards(make_shards(tmp_path / "images", tmp_path / "shards"), "train")
    plan = BatchPlan(shards.order(0), 1)
    with pretraining_loader(
        shards, plan, AUGMENTATIONS["v2"], 16, num_workers=2, end_step=3
    ) as loader:
        batches = list(loader)
    assert [batch.index.tolist() for batch in batches] == [[0], [0], [0]]
    assert [batch.epoch for batch in batches] == [0, 1, 2]
    assert not np.array_equal(batches[0].views, batches[1].views)
    with pytest.raises(UserError, match="1 samples do not fill one global batch of 2"):
        BatchPlan(shards.order(0), 2)


def test_fewer_samples_than_a_batch_are_an_error_on_every_rank(tmp_path: Path) -> None:
    for seed in range(3):
        write_image(tmp_path / "images" / f"{seed}.jpg", seed=seed)
    folder = make_shards(tmp_path / "images", tmp_path / "shards")
    flags = ("--data-dir", folder, "--output-dir", tmp_path / "out", "--batch-size", 4)
    status, output = forked(*flags, "--bn-group-size", 2, "--device", "cpu", ranks=2)
    assert status == 2
    assert "3 samples do not fill one global batch of 4; lower --batch-size" in output
    assert "Traceback" not in output
