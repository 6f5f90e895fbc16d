"""Images that cannot be decoded: what is seen in their place, where it is said, when it ends."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, forked
from harness import run_ranks

from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.images.crop import CROP_SLOTS, crop_box, write_crop
from moco_scale.data.images.decode import decode_rgb
from moco_scale.data.loading.bad_samples import TRIES, substitutes
from moco_scale.data.loading.loader import ViewBatch, evaluation_loader, pretraining_loader
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.sampling.random import uniforms
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.evaluation.features import SkippedImages, extract
from moco_scale.utils.errors import UserError

AUG = AUGMENTATIONS["cifar"]
SIZE = 16


def spoil(shards: Path, split: str, damage: Mapping[int, Callable[[bytes], bytes]]) -> None:
    """Change the bytes of some images where they lie, keeping their length."""
    rows = np.load(shards / f"{split}-index.npy")
    for sample, change in damage.items():
        with open(shards / f"{split}-{rows[sample]['shard']:06d}.tar", "r+b") as file:
            file.seek(int(rows[sample]["offset"]))
            data = file.read(int(rows[sample]["size"]))
            file.seek(int(rows[sample]["offset"]))
            changed = change(data)
            assert len(changed) == len(data)
            file.write(changed)


def half_zeroed(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def wrong_type(data: bytes) -> bytes:
    return (b"<html>not found</html>" * len(data))[: len(data)]


def bomb(data: bytes) -> bytes:
    size = data.index(b"\xff\xc0") + 5
    return data[:size] + b"\xc3\x50\xc3\x50" + data[size + 4 :]


def cut_short(data: bytes) -> bytes:
    """As a truncated file that was put into a tar: its end is missing."""
    return data[:100] + b"\xff\xd9" + bytes(len(data) - 102)


DAMAGE = {3: half_zeroed, 4: zeroed, 11: wrong_type, 12: bomb, 30: cut_short}
REASONS = {
    3: "broken JPEG",
    4: "nothing but zeros",
    11: "not an image in any known format",
    12: "50000 x 50000",
    30: "broken JPEG",
}


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """32 training images, 5 of which are bad, each in a way of its own."""
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    spoil(folder, "train", DAMAGE)
    return folder


def read(images: IndexedShards, world: int, workers: int) -> list[list[ViewBatch]]:
    """Two epochs: for each step the ranks' batches."""
    plan = BatchPlan(images.order(5), 8)
    by_rank = []
    for rank in range(world):
        with pretraining_loader(
            images,
            plan,
            AUG,
            SIZE,
            rank=rank,
            world=world,
            num_workers=workers,
            end_step=8,
            bad_samples="skip",
        ) as loader:
            by_rank.append(list(loader))
    return [list(parts) for parts in zip(*by_rank, strict=True)]


def test_another_image_takes_its_place_with_its_own_label(shards: Path) -> None:
    images = IndexedShards.open(shards)
    met = []
    for (batch,) in read(images, 1, 0):
        assert len(batch.index) == 8
        bad = {record.sample: record for record in batch.bad}
        assert bad.keys() == set(batch.index.tolist()) & DAMAGE.keys()
        met += [(batch.epoch, record) for record in batch.bad]
        for i, sample in enumerate(batch.index.tolist()):
            seen = bad[sample].replacement if sample in bad else sample
            assert batch.labels[i] == images.labels[seen]
            pixels = decode_rgb(images.read(seen))
            for view in range(2):
                # Cropped as the sample is whose place it takes: the same image elsewhere in the
                # batch is cropped in another way.
                numbers = uniforms(5, batch.epoch, np.array([sample]), view, CROP_SLOTS).tolist()
                height, width = pixels.shape[:2]
                box = crop_box(numbers[0], height, width, AUG.crop_min, AUG.crop_max)
                expected = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
                write_crop(expected, pixels, box)
                assert torch.equal(batch.views[view, i], expected)
    assert sorted(record.sample for _, record in met) == sorted([*DAMAGE, *DAMAGE])
    for epoch, record in met:
        tried = list(substitutes(5, epoch, record.sample, 32))
        assert record.replacement == next(other for other in tried if other not in DAMAGE)
        assert REASONS[record.sample] in record.reason
        place = images.place(record.sample)
        assert (record.shard, record.key) == (place.shard, place.key)
    assert len({(r.sample, r.replacement) for _, r in met}) > len(DAMAGE)  # not always the same


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 3), (4, 1)])
def test_ranks_and_workers_change_nothing(shards: Path, world: int, workers: int) -> None:
    images = IndexedShards.open(shards)
    for parts, (alone,) in zip(read(images, world, workers), read(images, 1, 0), strict=True):
        assert torch.equal(torch.cat([p.views for p in parts], 1), alone.views)
        assert torch.equal(torch.cat([p.labels for p in parts]), alone.labels)
        assert [record for p in parts for record in p.bad] == list(alone.bad)


def test_substitutes_are_near_at_first_and_never_the_sample_itself() -> None:
    tried = [list(substitutes(1, 0, sample, 100_000)) for sample in range(0, 1000, 10)]
    assert all(len(others) == TRIES for others in tried)
    first = np.array([others[0] for others in tried]) - np.arange(0, 1000, 10)
    distance = np.minimum(first % 100_000, -first % 100_000)
    assert distance.min() > 0 and distance.max() <= 33
    last = np.array([others[-1] for others in tried])
    assert last.min() < 10_000 and last.max() > 90_000
    assert not {0} & set(substitutes(1, 0, 0, 2)) and not list(substitutes(1, 0, 0, 1))


def test_a_set_without_any_image_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    spoil(folder, "train", dict.fromkeys(range(32), wrong_type))
    with pytest.raises(UserError, match=r"nor any of 64 others .* shard --check"):
        read(IndexedShards.open(folder), 1, 0)


def test_evaluation_leaves_them_out_and_says_so(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = IndexedShards.open(shards)
    with pytest.raises(UserError, match="--bad-samples skip"):
        list(evaluation_loader(images, SIZE, 1.0, batch_size=8, num_workers=0))
    whole = [i for i in range(32) if i not in DAMAGE]
    loader = evaluation_loader(images, SIZE, 1.0, batch_size=8, num_workers=1, bad_samples="skip")
    assert [i for batch in loader for i in batch.index.tolist()] == whole
    skipped = SkippedImages()
    for _ in range(2):
        features, labels = extract(
            torch.nn.Flatten(),
            images,
            image_size=SIZE,
            resize_ratio=1.0,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            num_workers=0,
            skipped=skipped,
        )
        assert len(features) == 27
        assert labels.tolist() == images.labels[whole].tolist()
        assert skipped.places == set(DAMAGE)
    assert dict(skipped.counts) == {"train": 5}
    said = capsys.readouterr().err
    assert said.count("5 of the 32 train images cannot be decoded and are skipped") == 1


def extracted(folder: Path) -> tuple[list[int], dict[str, int]]:
    skipped = SkippedImages()
    _, labels = extract(
        torch.nn.Flatten(),
        IndexedShards.open(folder),
        image_size=SIZE,
        resize_ratio=1.0,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        num_workers=0,
        skipped=skipped,
    )
    return labels.tolist(), dict(skipped.counts)


def test_ranks_agree_on_what_is_left_out(shards: Path) -> None:
    assert run_ranks(extracted, 2, shards) == [extracted(shards)] * 2


def listed(out: Path) -> list[dict[str, object]]:
    text = (out / "bad_samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_lists_them_once_whatever_its_ranks_and_interruptions(
    shards: Path, tmp_path: Path
) -> None:
    def flags(out: str) -> tuple[object, ...]:
        return (*TINY, "--data-dir", shards, "--output-dir", tmp_path / out)

    stopped = forked(*flags("one"), "--print-freq", 3)
    assert stopped.status == 2
    assert re.search(r"cannot decode the image in .*--bad-samples skip", stopped.output)
    whole = forked(*flags("one"), "--bad-samples", "skip", "--print-freq", 3)
    assert whole.status == 0, whole.output
    records = listed(tmp_path / "one")
    assert sorted(r["sample"] for r in records) == sorted(DAMAGE)  # type: ignore[type-var]
    assert list(records[0]) == ["sample", "shard", "key", "reason", "replacement", "step", "epoch"]
    assert {r["epoch"] for r in records} == {0}
    for r in records:
        assert f"cannot decode sample {r['sample']} in {r['shard']} (key {r['key']}): " in (
            whole.output
        )
    assert "bad images so far: 5 (" in whole.output
    assert (tmp_path / "one" / "log.txt").read_text().count("cannot decode sample") == 5
    # Two ranks, stopped in the first epoch and gone on with one, after a kill that left more.
    part = forked(*flags("two"), "--bad-samples", "skip", "--max-steps", 2, ranks=2)
    assert part.status == 0, part.output
    with (tmp_path / "two" / "bad_samples.jsonl").open("a") as file:
        file.write(json.dumps({**records[-1], "step": 3}) + '\n{"sample": 1')
    rest = forked(*flags("two"), "--bad-samples", "skip")
    assert rest.status == 0, rest.output
    assert listed(tmp_path / "two") == records


def test_above_the_share_every_rank_stops(tiny_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    spoil(folder, "train", dict.fromkeys(range(10, 22), half_zeroed))
    flags = (*TINY, "--data-dir", folder, "--output-dir", tmp_path / "out")
    run = forked(*flags, "--bad-samples", "skip", ranks=2)
    assert run.status == 2, run.output
    assert run.output.count("error: ") == 1
    assert re.search(
        r"1[12] of the (24|32) images read so far cannot be decoded, more than --max-bad-share "
        r"0.01 allows \(train-00000\d.tar: \d+, train-00000\d.tar: \d+\); "
        rf"{tmp_path}/out/bad_samples.jsonl lists them.*shard --check {folder}",
        run.output,
    )
    more = forked(*flags, "--bad-samples", "skip", "--max-bad-share", 0.5)
    assert more.status == 0, more.output
    assert len(listed(tmp_path / "out")) == 12
