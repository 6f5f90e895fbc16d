"""Decoded images kept for all processes of a node: the same pixels, in no more than there is."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_scale.data.images.augment import Augmentation
from moco_scale.data.images.decode import Decoder, decode_rgb
from moco_scale.data.loading import pixel_cache
from moco_scale.data.loading.loader import pretraining_loader
from moco_scale.data.loading.pixel_cache import PixelCache
from moco_scale.data.open import open_shards
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.shards.protocols import Shards
from moco_scale.utils.errors import UserError

AUG = Augmentation(crop_min=0.2)


@pytest.fixture
def shards(tiny_shards: Path) -> Shards:
    return open_shards(tiny_shards, "train")


def views(shards: Shards, cache: PixelCache | None, workers: int = 0) -> list[torch.Tensor]:
    """Two epochs of crops."""
    plan = BatchPlan(shards.order(0), 8)
    with pretraining_loader(
        shards, plan, AUG, 24, num_workers=workers, end_step=8, cache=cache
    ) as loader:
        return [batch.views.clone() for batch in loader]


def is_kept(cache: PixelCache, shards: Shards, i: int) -> bool:
    pixels = cache.get(i)
    return pixels is not None and np.array_equal(pixels, decode_rgb(shards.read(i)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_changes_no_pixel_and_the_second_epoch_decodes_nothing(
    shards: Shards, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PixelCache.open(shards, str(tmp_path))
    assert cache.filled == 0
    expected = views(shards, None)
    assert all(
        torch.equal(a, b) for a, b in zip(views(shards, cache, workers), expected, strict=True)
    )
    assert cache.filled == 1  # also when workers filled it

    def refuse(*_: object) -> None:
        raise AssertionError("decoded once more")

    monkeypatch.setattr(Decoder, "__call__", refuse)
    assert all(torch.equal(a, b) for a, b in zip(views(shards, cache), expected, strict=True))
    cache.close()


def test_a_folder_keeps_it_for_the_next_run(shards: Shards, tmp_path: Path) -> None:
    first = PixelCache.open(shards, str(tmp_path))
    views(shards, first)
    first.close()
    first.close()
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "meta.json").read_text())["complete"]
    again = PixelCache.open(shards, str(tmp_path))
    assert again.filled == 1
    assert is_kept(again, shards, 3)
    again.close()


@pytest.mark.parametrize("harm", ["shorter", "table", "other decoder", "no meta", "after a crash"])
def test_what_cannot_be_trusted_is_made_again(shards: Shards, tmp_path: Path, harm: str) -> None:
    cache = PixelCache.open(shards, str(tmp_path))
    views(shards, cache)
    cache.close()
    (folder,) = tmp_path.iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    if harm == "shorter":
        (folder / "pixels").write_bytes((folder / "pixels").read_bytes()[:-1])
    elif harm == "table":
        table = bytearray((folder / "table.npy").read_bytes())
        table[-1] ^= 1
        (folder / "table.npy").write_bytes(table)
    elif harm == "other decoder":
        (folder / "meta.json").write_text(json.dumps(meta | {"decoders": ["0", "0"]}))
    elif harm == "no meta":
        (folder / "meta.json").unlink()
    else:  # of a machine that was not shut down
        changed = meta | {"complete": False, "boot": "another"}
        (folder / "meta.json").write_text(json.dumps(changed))
    again = PixelCache.open(shards, str(tmp_path))
    assert again.filled == 0
    again.close()


def test_other_images_have_a_cache_of_their_own(shards: Shards, tmp_path: Path) -> None:
    caches = [PixelCache.open(s, str(tmp_path)) for s in (shards, shards.subset(np.arange(5)))]
    assert len(list(tmp_path.iterdir())) == 2
    for cache in caches:
        cache.close()


def test_one_in_memory_goes_with_its_last_user(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "SHARED_MEMORY", tmp_path)
    one, two = (PixelCache.open(shards, "ram") for _ in range(2))  # two ranks
    one.put(0, decode_rgb(shards.read(0)))
    assert two.get(0) is not None
    one.close()
    assert two.get(1) is None
    assert list(tmp_path.iterdir())
    two.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_in_memory_is_removed(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "SHARED_MEMORY", tmp_path)
    left = PixelCache.open(shards.subset(np.arange(5)), "ram")
    in_use = PixelCache.open(shards.subset(np.arange(6)), "ram")
    assert left._used is not None
    left._used.close()  # as its end would
    now = PixelCache.open(shards, "ram")
    assert sorted(tmp_path.iterdir()) == sorted([in_use.folder, now.folder])
    in_use.close()
    now.close()
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(decode_rgb(shards.read(i)).size for i in range(len(shards)))
    monkeypatch.setattr(pixel_cache, "SHARED_MEMORY", tmp_path)
    for memory in (0, total):  # seen from a part of the sizes, and from all of them
        monkeypatch.setattr(pixel_cache, "_free_memory", lambda memory=memory: memory)
        with pytest.raises(UserError, match=r"--cache ram: the 32 images .* once decoded"):
            PixelCache.open(shards, "ram")
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(pixel_cache, "_free_memory", lambda: 3 * total)
    PixelCache.open(shards, "ram").close()


def test_a_place_that_cannot_be_used_is_named(shards: Shards, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache .*file"):
        PixelCache.open(shards, str(tmp_path / "file"))


def _open_and_fill(shards: Shards, place: str, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    cache = PixelCache.open(shards, place)
    for i in range(len(shards)):
        cache.put(i, decode_rgb(shards.read(i)))
    cache.close()


def test_many_open_and_fill_it_at_once(shards: Shards, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_open_and_fill, args=(shards, str(tmp_path), barrier))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    cache = PixelCache.open(shards, str(tmp_path))
    assert cache.filled == 1
    for i in range(len(shards)):
        assert is_kept(cache, shards, i)
    cache.close()


def test_it_travels_to_processes_that_are_not_forked(shards: Shards, tmp_path: Path) -> None:
    cache = PixelCache.open(shards, str(tmp_path))
    copy = pickle.loads(pickle.dumps(cache))
    copy.put(2, decode_rgb(shards.read(2)))
    assert is_kept(cache, shards, 2)
    copy.close()  # holds no lock, and removes nothing
    cache.close()


def test_images_that_are_not_what_their_header_says_are_not_kept(
    shards: Shards, tmp_path: Path
) -> None:
    cache = PixelCache.open(shards, str(tmp_path))
    cache.put(0, np.zeros((3, 3, 3), np.uint8))
    assert cache.get(0) is None
    cache.close()


def test_locks_are_taken_as_a_network_file_system_wants_them(
    shards: Shards, tmp_path: Path, locks_of_nfs: None
) -> None:
    with contextlib.closing(PixelCache.open(shards, str(tmp_path))) as cache:
        cache.put(0, decode_rgb(shards.read(0)))
        other = PixelCache.open(shards, str(tmp_path))
        assert is_kept(other, shards, 0)
        pixel_cache._remove_unused(cache.folder)
        assert cache.folder.exists()
        other.close()
    pixel_cache._remove_unused(cache.folder)
    assert not cache.folder.exists()


def test_a_folder_without_locks_is_an_error(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"--cache .* has no locks .*; name a folder on a local"):
        PixelCache.open(shards, str(tmp_path))


NAMES = ("meta.json", "pixels", "done", "table.npy", "used", "changing")


def of_the_user(folder: Path) -> dict[str, str]:
    """A folder with files of all names that a cache has; the files and what is in them."""
    folder.mkdir()
    for name in (*NAMES, "thesis"):
        (folder / name).write_text(f"my {name}")
    return content(folder)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def shared_memory(shards: Shards, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a cache in memory, which is this folder."""
    monkeypatch.setattr(pixel_cache, "SHARED_MEMORY", folder)
    cache = PixelCache.open(shards, "ram")
    place = cache.folder
    cache.close()
    assert not place.exists()
    return place


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "fifo", "another user's"])
def test_a_stranger_in_the_place_of_the_cache_is_refused_and_left_alone(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    mine = tmp_path / "mine"
    before = of_the_user(mine)
    (tmp_path / "shm").mkdir()
    place = shared_memory(shards, tmp_path / "shm", monkeypatch)
    if what == "link":
        place.symlink_to(mine)
    elif what == "dangling link":
        place.symlink_to(tmp_path / "to be made")
    elif what == "file":
        place.write_text("")
    elif what == "fifo":
        os.mkfifo(place)
    else:
        if os.geteuid():
            pytest.skip("to make another user's folder takes root")
        place.mkdir()
        os.chown(place, 12345, 12345)
    for spec in ("ram", str(tmp_path / "shm")):
        with pytest.raises(UserError, match=rf"--cache {spec}: .*{place.name} .*; name another"):
            PixelCache.open(shards, spec)
    assert content(mine) == before
    assert not (tmp_path / "to be made").exists()
    assert os.path.lexists(place)


@pytest.mark.parametrize("what", ["link", "dangling link", "file"])
def test_strangers_among_what_killed_runs_left_are_left_alone(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    mine = tmp_path / "mine"
    before = of_the_user(mine)
    (tmp_path / "shm").mkdir()
    place = shared_memory(shards, tmp_path / "shm", monkeypatch)
    other = place.with_name(place.name[:-4] + "beef")
    if what == "file":
        other.write_text("")
    else:
        other.symlink_to(mine if what == "link" else tmp_path / "nothing")
    shared_memory(shards, tmp_path / "shm", monkeypatch)
    assert os.path.lexists(other)
    assert content(mine) == before
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", NAMES)
def test_links_inside_the_cache_are_not_followed(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "shm").mkdir()
    place = shared_memory(shards, tmp_path / "shm", monkeypatch)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    place.mkdir()
    (place / name).symlink_to(mine)
    with contextlib.suppress(UserError):
        PixelCache.open(shards, "ram").close()
    assert mine.read_text() == "mine"


def test_only_its_own_files_are_removed(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "SHARED_MEMORY", tmp_path)
    cache = PixelCache.open(shards, "ram")
    (cache.folder / "thesis").write_text("mine")
    cache.close()
    assert content(cache.folder) == {"thesis": "mine"}


def test_it_is_closed_to_others(shards: Shards, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache = PixelCache.open(shards, str(tmp_path / "cache"))
    finally:
        os.umask(before)
    assert cache.folder.stat().st_mode & 0o077 == 0
    cache.close()


@pytest.mark.parametrize("meta", ["[]", "{", '{"boot": 3}', "[" * 100_000, "{}", "\x00"])
def test_a_damaged_note_makes_it_anew(shards: Shards, tmp_path: Path, meta: str) -> None:
    cache = PixelCache.open(shards, str(tmp_path))
    cache.put(0, decode_rgb(shards.read(0)))
    (cache.folder / "meta.json").write_text(meta)
    cache.close()
    again = PixelCache.open(shards, str(tmp_path))
    assert again.filled == 0
    again.close()
