"""Random access to shards: what it returns, what it holds open, and what it refuses."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from moco_scale.__main__ import main
from moco_scale.data.shards import index_file, indexed_shards
from moco_scale.data.shards.header_check import IndexedTars, note_checked
from moco_scale.data.shards.index_file import INDEX_DTYPE, has_split
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.utils.errors import UserError


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """Shards of 24 training images, 5 in a shard, and 12 validation images."""
    out = tmp_path / "shards"
    options = ["--out", str(out), "--shard-size", "5", "--workers", "1"]
    assert main(["shard", "--source", str(image_folder), *options]) == 0
    return out


def everything(shards: IndexedShards) -> list[bytes]:
    return [bytes(shards.read(i)) for i in range(len(shards))]


def test_labels_and_names(folder: Path) -> None:
    shards = IndexedShards.open(str(folder), "val")
    assert (shards.split, shards.data_dir) == ("val", folder)
    assert shards.labels.dtype == np.int32
    assert sorted(shards.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(IndexedShards.open(folder)) == 24


def test_reading_does_not_copy_and_knows_its_bounds(folder: Path) -> None:
    shards = IndexedShards.open(folder)
    image = shards.read(3)
    assert isinstance(image, memoryview) and image.readonly
    assert bytes(image[:2]) == b"\xff\xd8" and bytes(image[-2:]) == b"\xff\xd9"
    assert bytes(shards.read(np.int64(3))) == bytes(image)  # type: ignore[arg-type]
    for i in (-1, 24):
        with pytest.raises(IndexError):
            shards.read(i)


def test_where_names_shard_byte_and_key(folder: Path) -> None:
    shards = IndexedShards.open(folder)
    for i in range(len(shards)):
        name, _, rest = shards.where(i).partition(" at byte ")
        offset, _, key = rest.partition(" (key ")
        with (folder / name).open("rb") as file:
            file.seek(int(offset))
            assert file.read(len(shards.read(i))) == bytes(shards.read(i))
        with tarfile.open(folder / name) as tar:
            member = next(m for m in tar if m.offset_data == int(offset))
        assert f"{key.removesuffix(')')}.jpg" == member.name == f"{i:09d}.jpg"


def test_subsets_of_subsets(folder: Path) -> None:
    shards = IndexedShards.open(folder)
    part = shards.subset(np.array([20, 3, 3, 7]))
    again = part.subset(np.array([3, 0]))
    read = everything(shards)
    assert everything(part) == [read[20], read[3], read[3], read[7]]
    assert everything(again) == [read[7], read[20]]
    assert again.labels.tolist() == shards.labels[[7, 20]].tolist()
    assert again.where(1) == shards.where(20)
    assert again.classes == shards.classes
    fingerprints = {s.fingerprint for s in (shards, part, again, shards.subset(np.array([3, 20])))}
    assert len(fingerprints) == 4
    assert shards.subset(np.array([7, 20])).fingerprint == again.fingerprint
    for wrong in ([24], [-1], [[1]]):
        with pytest.raises(IndexError):
            shards.subset(np.array(wrong))


def test_the_fingerprint_is_that_of_the_contents(folder: Path, tmp_path: Path) -> None:
    first = IndexedShards.open(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert IndexedShards.open(tmp_path / "copy").fingerprint == first
    assert IndexedShards.open(folder, "val").fingerprint != first
    int(first, 16)


def test_pickled_and_forked(folder: Path) -> None:
    shards = IndexedShards.open(folder).subset(np.arange(20)[::-1])
    expected = everything(shards)
    copy = pickle.loads(pickle.dumps(shards))
    assert everything(copy) == expected
    assert copy.fingerprint == shards.fingerprint
    assert len(pickle.dumps(shards)) < 4000  # paths and positions, no images, no rows
    with multiprocessing.get_context("fork").Pool(1) as pool:
        forked = pool.apply_async(lambda_free_read, (shards,)).get(timeout=60)
    assert forked == expected


def lambda_free_read(shards: IndexedShards) -> list[bytes]:
    return everything(shards)


def test_a_bounded_number_of_shards_is_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_shards, "_max_open_maps", lambda: 2)
    shards = IndexedShards.open(folder)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    expected: dict[int, bytes] = {}
    for i in np.random.default_rng(0).permutation(np.repeat(np.arange(24), 3)).tolist():
        expected.setdefault(i, bytes(shards.read(i)))
        assert bytes(shards.read(i)) == expected[i]
        assert len(shards._maps) <= 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    kept = shards.read(0)  # outlives its map's place
    for i in range(24):
        shards.read(i)
    assert bytes(kept) == expected[0]


def test_an_index_of_a_million_is_mapped_not_read(tmp_path: Path) -> None:
    rows = np.zeros(1_000_000, INDEX_DTYPE)
    rows["offset"], rows["size"], rows["label"] = 512, 100, -1
    np.save(tmp_path / "train-index.npy", rows)
    (tmp_path / "train-000000.tar").write_bytes(bytes(10240))
    entry = index_file.split_entry("train", rows, [("train-000000.tar", 10240, len(rows))])
    header = {"format": index_file.FORMAT, "version": 1, "classes": [], "splits": {"train": entry}}
    (tmp_path / "index.json").write_text(json.dumps(header))
    tar = tmp_path / "train-000000.tar"
    changed = [tar.stat().st_mtime_ns]
    note_checked(IndexedTars(tmp_path, "train", entry["checksum"], [tar], changed, rows))
    shards = IndexedShards.open(tmp_path)
    assert len(shards) == 1_000_000
    array: Any = shards._rows
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array, np.memmap)


def test_has_split(folder: Path, tmp_path: Path) -> None:
    assert has_split(folder, "train") and has_split(str(folder), "val")
    assert not has_split(folder, "test")
    assert not has_split(tmp_path / "nothing", "train")
    (folder / "index.json").write_text("{")
    assert not has_split(folder, "train")


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        IndexedShards.open(folder, split)
    return str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path / "data")
    assert str(tmp_path / "data") in message
    assert f"python -m moco_scale shard --source IMAGES --out {tmp_path / 'data'}" in message


def test_images_instead_of_shards(image_folder: Path, tmp_path: Path) -> None:
    out = f"{image_folder}-shards"
    command = f"python -m moco_scale shard --source {image_folder} --out {out}"
    assert refusal(image_folder).endswith(command)
    tar = tmp_path / "my images.tar.gz"
    tar.touch()
    command = f"--source '{tar}' --out '{tmp_path}/my images-shards'"
    assert refusal(tar).endswith(command)


def test_the_suggested_command_works(image_folder: Path) -> None:
    command = refusal(image_folder).partition("python -m moco_scale ")[2].split()
    assert main([*command, "--workers", "1"]) == 0
    assert len(IndexedShards.open(f"{image_folder}-shards")) == 24


def test_other_folders(folder: Path, tmp_path: Path) -> None:
    assert f"did you mean {folder}" in refusal(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert "is empty" in refusal(foreign)
    unfinished = tmp_path / "out.partial-0123abcd"
    unfinished.mkdir()
    assert "did not finish" in refusal(unfinished)


def test_no_such_split(folder: Path) -> None:
    message = refusal(folder, "test")
    assert "'test'" in message and "train, val" in message


def test_a_missing_shard(folder: Path) -> None:
    (folder / "train-000003.tar").unlink()
    message = refusal(folder)
    assert "train-000003.tar is missing" in message
    assert len(IndexedShards.open(folder, "val")) == 12


@pytest.mark.parametrize(("change", "word"), [(-1, "truncated"), (512, "replaced")])
def test_a_shard_of_another_size(folder: Path, change: int, word: str) -> None:
    path = folder / "train-000002.tar"
    os.truncate(path, path.stat().st_size + change)
    message = refusal(folder)
    assert "train-000002.tar" in message and word in message


def test_a_shard_that_shrinks_after_opening(folder: Path) -> None:
    shards = IndexedShards.open(folder)
    os.truncate(folder / "train-000000.tar", 1024)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar is truncated"):
        shards.read(0)
    with pytest.raises(UserError, match=r"Cannot read shard .*train-000001\.tar"):
        shards.read(5)


def _other_rows(folder: Path) -> None:
    rows = np.load(folder / "train-index.npy")
    rows["label"][0] = (rows["label"][0] + 1) % 3
    np.save(folder / "train-index.npy", rows)


def _of_val(folder: Path) -> None:
    shutil.copy(folder / "val-index.npy", folder / "train-index.npy")


def _cut(folder: Path) -> None:
    os.truncate(folder / "train-index.npy", 300)


def _no_npy(folder: Path) -> None:
    (folder / "train-index.npy").write_bytes(pickle.dumps({"a": 1}))


def _other_dtype(folder: Path) -> None:
    np.save(folder / "train-index.npy", np.zeros(24))


def _gone(folder: Path) -> None:
    (folder / "train-index.npy").unlink()


def _version(folder: Path) -> None:
    edit(folder, lambda header: header.update(version=2))


def _format(folder: Path) -> None:
    (folder / "index.json").write_text('["something else"]')


def _no_json(folder: Path) -> None:
    (folder / "index.json").write_text('{"format": ')


def _shard_list(folder: Path) -> None:
    edit(folder, lambda header: header["splits"]["train"]["shards"].pop())


def _no_sizes(folder: Path) -> None:
    edit(folder, lambda header: header["splits"]["train"]["shards"][0].pop("bytes"))


def _elsewhere(folder: Path) -> None:
    edit(folder, lambda h: h["splits"]["train"]["shards"][0].update(name="../train-000000.tar"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header = json.loads((folder / "index.json").read_text())
    change(header)
    (folder / "index.json").write_text(json.dumps(header))


def consistent(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the rows and the checksum with them."""
    rows = np.load(folder / "train-index.npy")
    change(rows)
    np.save(folder / "train-index.npy", rows)
    checksum = index_file.rows_checksum(rows)
    edit(folder, lambda header: header["splits"]["train"].update(checksum=checksum))


def _beyond(folder: Path) -> None:
    def change(rows: np.ndarray) -> None:
        rows["offset"][7] = 10**9

    consistent(folder, change)


def _no_shard(folder: Path) -> None:
    def change(rows: np.ndarray) -> None:
        rows["shard"][7] = 5

    consistent(folder, change)


def _no_class(folder: Path) -> None:
    def change(rows: np.ndarray) -> None:
        rows["label"][7] = 3

    consistent(folder, change)


def test_what_is_whole_and_cannot_be_opened_is_not_to_be_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(index_file, "map_rows", mock.Mock(side_effect=full))
    message = refusal(folder)
    assert "ulimit -n" in message
    assert "--overwrite" not in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_rows, "checksum"),
        (_of_val, "has 12 samples, index.json says 24"),
        (_cut, "damaged"),
        (_no_npy, "damaged"),
        (_other_dtype, "damaged"),
        (_gone, "Cannot read the index"),
        (_version, "version 2"),
        (_format, "not an index"),
        (_no_json, "damaged"),
        (_shard_list, "do not add up"),
        (_no_sizes, "bytes"),
        (_elsewhere, "is no name of a file"),
        (_beyond, "outside the shards"),
        (_no_shard, "outside the shards"),
        (_no_class, "no class"),
    ],
)
def test_an_index_that_does_not_match(
    folder: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(folder)
    message = refusal(folder)
    assert words in message
    assert "python -m moco_scale shard" in message
    assert "index" in message
