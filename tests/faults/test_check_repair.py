"""`shard --check` finds every kind of damage; `shard --repair` keeps what can be kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moco_scale.__main__ import main
from moco_scale.data.images.decode import decode_rgb
from moco_scale.data.open import open_shards
from moco_scale.data.shards.indexed_shards import IndexedShards


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def place(shards: Path, sample: int, split: str = "train") -> tuple[Path, int, int]:
    """(tar, offset, size) of an image."""
    row = np.load(shards / f"{split}-index.npy")[sample]
    return shards / f"{split}-{row['shard']:06d}.tar", int(row["offset"]), int(row["size"])


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def half_zeroed(shards: Path) -> set[int]:
    tar, offset, size = place(shards, 3)
    write(tar, offset + size // 2, bytes(size - size // 2))
    return {3}


def header_in_the_middle(shards: Path) -> set[int]:
    tar, offset, _ = place(shards, 12)
    write(tar, offset - 500, b"\xff" * 10)
    return set()


def truncated(shards: Path) -> set[int]:
    tar, offset, _ = place(shards, 28)
    os.truncate(tar, offset + 10)
    return {28, 29, 30, 31}


def missing(shards: Path) -> set[int]:
    tar, _, _ = place(shards, 8)
    tar.unlink()
    return set(range(8, 16))


def empty(shards: Path) -> set[int]:
    tar, _, _ = place(shards, 0)
    tar.write_bytes(b"")
    return set(range(8))


def no_index(shards: Path) -> set[int]:
    for path in (*shards.glob("*.npy"), shards / "index.json"):
        path.unlink()
    return set()


def no_rows_and_no_header(shards: Path) -> set[int]:
    (shards / "index.json").unlink()
    (shards / "val-index.npy").unlink()
    return set()


def damaged_rows(shards: Path) -> set[int]:
    os.truncate(shards / "train-index.npy", 50)
    return set()


def damaged_header(shards: Path) -> set[int]:
    os.truncate(shards / "index.json", 50)
    return set()


def another_byte(shards: Path) -> set[int]:
    """In a label, which nothing reads: found by the checksum."""
    tar, offset, size = place(shards, 5)
    write(tar, offset + size + -size % 512 + 2 * 512 - 10, b"x")
    return set()


DAMAGE = (
    half_zeroed,
    header_in_the_middle,
    truncated,
    missing,
    empty,
    no_rows_and_no_header,
    damaged_rows,
    damaged_header,
    another_byte,
)


def contents(shards: Path, split: str = "train") -> list[tuple[bytes, int]]:
    images = IndexedShards.open(shards, split)
    return [(bytes(images.read(i)), int(images.labels[i])) for i in range(len(images))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_is_whole_is_left_alone(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(shards)
    assert main(["shard", "--check", str(shards), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "40 images in 5 shards read and decoded" in said and "is whole" in said
    assert main(["shard", "--repair", str(shards)]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert files(shards) == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_what_can_be_kept_is_kept(
    damage: Callable[[Path], set[int]], shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, val = contents(shards), contents(shards, "val")
    fingerprint = IndexedShards.open(shards).fingerprint
    lost = damage(shards)
    damaged = files(shards)
    check = ["shard", "--check", str(shards), "--workers", "1"]
    found = main(check)
    said = capsys.readouterr().out
    assert found == 1
    assert "DAMAGED" in said and f"shard --repair {shards}" in said
    assert files(shards) == damaged
    assert main(["shard", "--repair", str(shards), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert contents(shards) == [item for i, item in enumerate(before) if i not in lost]
    assert contents(shards, "val") == val
    for data, _ in contents(shards):
        decode_rgb(data)
    left_out = shards / "left_out.jsonl"
    entries = [json.loads(line) for line in left_out.read_text().splitlines()] if lost else []
    assert len(entries) == len(lost) and left_out.exists() == bool(lost)
    assert (f"lost: {len(lost)} images, listed in {left_out}" in said) == bool(lost)
    assert ("nothing is lost" in said) == (not lost)
    assert main(check) == 0, capsys.readouterr().out
    # Nothing of the user's is gone: what was there is there under this or another name.
    now = list(files(shards).values())
    assert all(content in now for content in damaged.values())
    names_lost = damage in (no_rows_and_no_header, damaged_header)
    assert ("names of the 2 classes were in index.json" in said) == names_lost
    if damage in (no_rows_and_no_header, damaged_rows, damaged_header):  # runs can be resumed
        assert IndexedShards.open(shards).fingerprint == fingerprint


def test_without_any_index_a_truncated_tar_is_kept_as_far_as_it_goes(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(shards)
    truncated(shards)
    no_index(shards)
    assert main(["shard", "--repair", str(shards), "--workers", "1"]) == 0
    assert contents(shards) == before[:28]
    said = capsys.readouterr().out
    assert "4 images are kept in a new tar" in said
    assert "what was replaced is kept as train-000003.tar.damaged\n" in said
    assert "index.json" not in said  # there was none


def below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def in_folders(shards: Path, tmp_path: Path) -> Path:
    """A set as others have them: no index, and tars of the same names in two sub-folders."""
    folder = tmp_path / "in-folders"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for tar in shards.glob(f"{split}-*.tar"):
            shutil.copy(tar, folder / split / tar.name.removeprefix(f"{split}-"))
    return folder


def test_a_whole_set_of_others_is_left_as_it_is(
    shards: Path, in_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_index(shards)
    for folder in (shards, in_folders):
        before = below(folder)
        assert main(["shard", "--check", str(folder), "--workers", "1"]) == 0
        assert "has no index of its own" in capsys.readouterr().out
        assert main(["shard", "--repair", str(folder), "--workers", "1"]) == 0
        said = capsys.readouterr().out
        assert "nothing to repair" in said and "lost" not in said and "replaced" not in said
        assert below(folder) == before
        assert len(open_shards(folder, "train")) == 32


def test_tars_in_sub_folders_are_repaired_where_they_lie(
    shards: Path, in_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, val = contents(shards), contents(shards, "val")
    for split, sample in (("train", 3), ("val", 5)):  # train/000000.tar and val/000000.tar
        row = np.load(shards / f"{split}-index.npy")[sample]
        tar, offset = in_folders / split / f"{row['shard']:06d}.tar", int(row["offset"])
        write(tar, offset - 500, b"\xff" * 10)
    damaged = below(in_folders)
    assert main(["shard", "--check", str(in_folders), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert "train/000000.tar: is damaged" in said and "val/000000.tar: is damaged" in said
    assert main(["shard", "--repair", str(in_folders), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "train/000000.tar.damaged" in said and "val/000000.tar.damaged" in said
    assert "lost: 2 images" in said
    repaired = open_shards(in_folders, "train")
    kept = [(bytes(repaired.read(i)), int(repaired.labels[i])) for i in range(len(repaired))]
    assert kept == [item for i, item in enumerate(before) if i != 3]
    assert contents(in_folders, "val") == [item for i, item in enumerate(val) if i != 5]
    assert repaired.where(0).startswith("train/000000.tar at byte")
    now = below(in_folders)
    assert all(
        now[f"{name}.damaged" if f"{name}.damaged" in now else name] == content
        for name, content in damaged.items()
    )
    assert main(["shard", "--check", str(in_folders), "--workers", "1"]) == 0
    assert main(["shard", "--repair", str(in_folders), "--workers", "1"]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_a_set_of_which_nothing_is_left_is_refused_and_left_as_it_was(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tar in shards.glob("val-*.tar"):
        tar.write_bytes(b"")
    before = files(shards)
    assert main(["shard", "--repair", str(shards), "--workers", "1"]) == 2
    assert "Nothing of the val images" in capsys.readouterr().err
    assert files(shards) == before


def test_flags_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("--check", "--repair", "--index"):
        assert main(["shard", mode, "x", "--overwrite", "--seed", "0", "--shard-size", "9"]) == 2
        said = capsys.readouterr().err
        assert "--overwrite, --shard-size, --seed would change nothing with --" in said
    assert main(["shard", "--check", "x", "--shard-cache", "y"]) == 2
    assert "--shard-cache would change nothing with --check" in capsys.readouterr().err
    for flag, value in (("--workers", "abc"), ("--seed", "1.5")):
        with pytest.raises(SystemExit):
            main(["shard", "--source", "x", "--out", "y", flag, value])
        said = f"argument {flag}: invalid whole number value: '{value}'\n"
        assert said in capsys.readouterr().err
    for flag, value, words in (
        ("--workers", "0", "must be greater than 0"),
        ("--quality", "500", "must lie between 1 and 100"),
    ):
        assert main(["shard", "--source", "x", "--out", "y", flag, value]) == 2
        assert f"error: {flag} {value}: {words}\n" in capsys.readouterr().err
    for flags in ([], ["--check", "x", "--out", "y"], ["--source", "x"]):
        assert main(["shard", *flags]) == 2
        assert "--source and --out to make shards" in capsys.readouterr().err
    assert main(["shard", "--check", str(tmp_path / "no")]) == 2
    assert "There is no folder" in capsys.readouterr().err
