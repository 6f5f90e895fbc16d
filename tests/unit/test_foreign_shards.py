"""Shards that were written elsewhere: which are a set, and their index."""

import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from foreign_sets import ALL, contents, expected, foreign_set, image, samples, write_tar
from harness import in_processes

from moco_scale.__main__ import main
from moco_scale.data.open import data_set, open_shards
from moco_scale.data.shards import index_place, scanned_index, tar_scan
from moco_scale.data.shards.recognise import look_into
from moco_scale.data.shards.shard_list import expand_braces, list_shards
from moco_scale.data.shards.tar_scan import scan_tar
from moco_scale.utils.errors import UserError


def test_what_systems_leave_in_a_tar_is_no_image(tmp_path: Path) -> None:
    left = ("@eaDir/0.jpg", "a/@eaDir/1.jpg", "__MACOSX/._0.jpg", ".AppleDouble/0.jpg", "._0.jpg")
    members = [(f"./{i}.jpg", image(i)) for i in range(2)]
    write_tar(tmp_path / "train-0.tar", [*members, *((name, image(9)) for name in left)])
    assert len(open_shards(tmp_path / "train-0.tar", "train")) == 2


def test_the_root_folder_is_no_set() -> None:
    with pytest.raises(UserError, match="/ is not a folder of shards"):
        open_shards("/", "train")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_set(tmp_path / "foreign")


def test_a_folder_of_tars_is_indexed_on_first_use(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = open_shards(foreign, "train")
    assert contents(shards) == ALL
    assert shards.classes == ["0", "1", "2"]
    assert shards.name == str(foreign)
    assert shards.where(6) == "set-train-0001.tar at byte 4096 (key 000006)"
    assert "indexed 24 images in 5 shards" in capfd.readouterr().err
    assert "val" in data_set(foreign).splits
    assert "test" not in data_set(foreign).splits
    assert list((foreign / index_place.FOLDER).glob("*/index.json"))

    def never(path: Path) -> None:
        raise AssertionError(f"{path} was scanned again")

    monkeypatch.setattr(scanned_index, "scan_tar", never)
    assert contents(open_shards(foreign, "val")) == expected(100, 4)
    assert open_shards(foreign, "train").fingerprint == shards.fingerprint


def test_it_reads_what_webdataset_reads(foreign: Path) -> None:
    pattern = str(foreign / "set-train-{0000..0003}.tar")
    stream = webdataset.WebDataset(pattern, shardshuffle=False)
    theirs = []
    for sample in stream.to_tuple("jpg;jpeg;png;webp", "cls"):
        theirs.append((sample[0], int(sample[1])))
    assert contents(open_shards(pattern, "train")) == theirs == ALL


@pytest.mark.parametrize(
    "pattern",
    [
        "{0}/set-train-{{0000..0003}}.tar",
        "{0}/set-train-*.tar",
        "{0}/set-train-000[0-3].tar",
        "{0}/set-train-{{0000..0001}}.tar::{0}/set-train-{{0002,0003}}.tar",
    ],
)
def test_patterns(foreign: Path, pattern: str) -> None:
    spec = pattern.format(foreign)
    assert contents(open_shards(spec, "train")) == ALL
    assert "val" not in data_set(spec).splits


def test_several_folders_make_one_set(foreign: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "more" / "train-0.tar", samples(50, 2))
    spec = f"{tmp_path / 'more'}::{foreign}/set-*-0000.tar"
    assert contents(open_shards(spec, "train")) == expected(50, 2) + ALL[:5]
    assert contents(open_shards(spec, "val")) == expected(100, 4)


def test_splits_are_told_by_names_of_files_or_folders(tmp_path: Path) -> None:
    for name in ("train/0.tar", "train/1.tar", "val/0.tar"):
        write_tar(tmp_path / name, samples(0, 1))
    found = list_shards(str(tmp_path))
    assert found is not None
    assert found.splits == {"train": ["train/0.tar", "train/1.tar"], "val": ["val/0.tar"]}
    shutil.rmtree(tmp_path / "val")
    os.rename(tmp_path / "train", tmp_path / "oval")  # a word, not a part of one
    found = list_shards(str(tmp_path))
    assert found is not None
    assert found.splits == {"train": ["oval/0.tar", "oval/1.tar"]}
    write_tar(tmp_path / "train-0.tar", samples(0, 1))
    write_tar(tmp_path / "extra.tar", samples(0, 1))
    with pytest.raises(UserError, match=r"train-0\.tar says .*extra\.tar"):
        list_shards(str(tmp_path))


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{9..10}") == ["9", "10"]
    for bad, word in (("a{1..", "brace"), ("a{3..1}", "backwards"), ("a}", "brace")):
        with pytest.raises(UserError, match=word):
            expand_braces(bad)
    for many in ("{0..99999999999}", "{0..9999}{0..9999}", "{a,b}" * 60, "{a,b}" * 3000):
        with pytest.raises(UserError, match="more than 1,048,576 names"):
            expand_braces(many)


def test_names_of_tars_and_folders_may_be_any_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "caf\udce9" / "train-\udce9.tar", samples(0, 1))
    for spec in (path.parent, path):
        assert contents(open_shards(spec, "train")) == contents(open_shards(spec, "train"))
    assert open_shards(path.parent, "train").where(0) == r"train-\xe9.tar at byte 512 (key 000000)"


def test_a_shard_that_braces_name_is_missing(foreign: Path) -> None:
    with pytest.raises(UserError, match=r"names 6 shards, of which 2 are missing.*0004\.tar"):
        open_shards(f"{foreign}/set-train-{{0000..0005}}.tar", "train")
    with pytest.raises(UserError, match=r"names 1 shards, of which 1 are missing"):
        open_shards(f"{foreign}/none-*.tar", "train")
    with pytest.raises(UserError, match="twice"):
        open_shards(f"{foreign}/set-train-0000.tar::{foreign}/set-train-*.tar", "train")


def test_one_tar_is_a_set(foreign: Path, tmp_path: Path) -> None:
    assert contents(open_shards(foreign / "set-train-0001.tar", "train")) == ALL[5:10]
    assert "val" not in data_set(foreign / "set-train-0001.tar").splits
    flat = write_tar(tmp_path / "flat.tar", samples(0, 3, label=""))
    assert open_shards(flat, "train").labels.tolist() == [-1] * 3
    # Folders are classes: shards of it have labels, and it has none as it is.
    classes = write_tar(tmp_path / "classes.tar", [("ash/0.jpg", image(0)), ("oak/1.jpg", b"x")])
    packed = tmp_path / "classes.tar.gz"
    packed.write_bytes(gzip.compress(classes.read_bytes()))
    for tar in (classes, packed):
        with pytest.raises(UserError, match=rf"with the folders .* as classes: .*--source {tar} "):
            open_shards(tar, "train")
    samples_in_gzip = tmp_path / "set.tar.gz"
    samples_in_gzip.write_bytes(gzip.compress((foreign / "set-train-0001.tar").read_bytes()))
    with pytest.raises(UserError, match=r"set\.tar\.gz is compressed.*gunzip"):
        open_shards(samples_in_gzip, "train")


def test_making_shards_of_samples_would_lose_their_labels(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, out = foreign / "set-train-0001.tar", tmp_path / "out"
    packed, inside = (
        tmp_path / "set.tgz",
        write_tar(tmp_path / "inside.tar", [(f"all/{name}", data) for name, data in samples(0, 2)]),
    )
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    nested = tmp_path / "nested"
    shutil.copytree(foreign, nested / "part")
    for source, words in (
        (tar, f"as it is, with --data-dir {tar}"),
        (inside, f"as it is, with --data-dir {inside}"),
        (packed, "once it is decompressed"),
        (foreign, f"as it is, with --data-dir {foreign}"),
        (nested, f"as it is, with --data-dir {nested}"),
    ):
        assert main(["shard", "--source", str(source), "--out", str(out)]) == 2
        assert f"can be trained on {words}" in capsys.readouterr().err
        assert not out.exists()
    command = ["shard", "--source", str(tar), "--out", str(out), "--workers", "1"]
    assert main([*command, "--unlabelled"]) == 0
    assert len(open_shards(out, "train")) == 5
    # Labels of their own beside class folders, which are what shards are made with.
    members = [(f"{c}/{name}", data) for c in ("ash", "oak") for name, data in samples(0, 2)]
    classes = write_tar(tmp_path / "classes.tar", members)
    made = tmp_path / "made"
    assert main(["shard", "--source", str(classes), "--out", str(made), "--workers", "1"]) == 0
    assert open_shards(made, "train").classes == ["ash", "oak"]


def test_what_a_tar_of_tars_is_takes_no_reading_of_them(tmp_path: Path) -> None:
    """As ILSVRC2012_img_train.tar is: 1000 tars in 138 GB."""
    path = tmp_path / "classes.tar"
    with path.open("wb") as file:
        for number in range(30):
            member = tarfile.TarInfo(f"n{number:08d}.tar")
            member.size = 1 << 22
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
            file.seek(member.size, os.SEEK_CUR)
        file.write(bytes(2 * tarfile.BLOCKSIZE))

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].partition("\n")[0])

    before = read_so_far()
    assert not look_into(path).images
    assert read_so_far() - before < 1 << 22


def test_compressed_tars_are_refused(foreign: Path) -> None:
    (foreign / "set-train-0004.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"0004\.tar\.gz is compressed.*gunzip"):
        open_shards(foreign, "train")


def test_a_shard_that_changes_is_noticed(foreign: Path) -> None:
    before = open_shards(foreign, "train").fingerprint
    changed = foreign / "set-train-0001.tar"
    write_tar(changed, samples(70, 5, "JPEG"))
    after = open_shards(foreign, "train")
    assert contents(after)[5:10] == expected(70, 5, "JPEG")
    assert after.fingerprint != before
    write_tar(foreign / "set-train-0009.tar", samples(80, 1))
    assert len(open_shards(foreign, "train")) == 21
    changed.unlink()
    assert len(open_shards(foreign, "train")) == 16
    folders = [path for path in (foreign / index_place.FOLDER).iterdir() if path.is_dir()]
    # One for each list of names, and none for what a shard was before.
    assert len(folders) == 3


def test_a_damaged_index_is_made_again(foreign: Path) -> None:
    open_shards(foreign, "train")
    (index,) = (foreign / index_place.FOLDER).glob("*/train-index.npy")
    index.write_bytes(index.read_bytes()[:-8])
    assert contents(open_shards(foreign, "train")) == ALL


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (foreign / index_place.FOLDER).touch()  # no folder can be made here, not even by root
    monkeypatch.delenv("MOCO_SCALE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = open_shards(foreign, "train")
    assert contents(shards) == ALL
    assert list((tmp_path / "cache/moco_scale/index").glob("*/*/train-index.npy"))
    shutil.copytree(foreign, tmp_path / "copy")  # the same names elsewhere: not the same set
    assert len(open_shards(tmp_path / "copy", "train")) == 20
    assert len(list((tmp_path / "cache/moco_scale/index").iterdir())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="MOCO_SCALE_CACHE"):
        open_shards(foreign, "train")


def _opened(folder: Path, gate: Any) -> tuple[int, int]:
    scanned: list[Path] = []

    def counted(path: Path) -> tar_scan.ShardScan:
        scanned.append(path)
        return scan_tar(path)

    scanned_index.scan_tar = counted
    index_place.MOST_WORKERS = 1
    return len(open_shards(folder, "train")), len(scanned)


def test_one_of_many_processes_scans(foreign: Path) -> None:
    found = in_processes(4, _opened, foreign)
    assert sorted(found) == [(20, 0), (20, 0), (20, 0), (20, 5)]


def test_a_command_makes_the_indices_of_all_sets_of_a_mixture(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"{foreign}:2,{shutil.copytree(foreign, tmp_path / 'copy')}:1"
    assert main(["shard", "--index", spec]) == 0
    monkeypatch.setattr(scanned_index, "scan_tar", None)  # from here on, none is scanned
    assert len(open_shards(spec, "train")) == 40
    assert sorted(data_set(spec).splits) == ["train", "val"]


def test_names_that_are_no_text_are_found_again(foreign: Path) -> None:
    odd = os.fsdecode(b"caf\xe9-train-000009.tar")
    shutil.copy(next(foreign.glob("*.tar")), foreign / odd)
    first, again = open_shards(foreign, "train"), open_shards(foreign, "train")
    assert contents(first) == contents(again) and len(first) > 20
    place = next(first.place(i) for i in range(len(first)) if first.place(i).shard == odd)
    assert str(place).startswith(r"caf\xe9-train-000009.tar at byte")
    index = next(foreign.glob(f"{index_place.FOLDER}/*/index.json"))
    index.write_text(index.read_text().replace("000009", "000008"))  # of other tars: made again
    assert contents(open_shards(foreign, "train")) == contents(first)


def test_labels_that_no_index_can_hold_leave_a_set_without_labels(tmp_path: Path) -> None:
    for name, why in (('"\\ud800"', "is not text"), (f'"{"x" * 1001}"', "1,001 characters")):
        folder = tmp_path / str(len(name))
        folder.mkdir()
        members = [("1.jpg", image(1)), ("1.json", f'{{"label": {name}}}'.encode())]
        write_tar(folder / "0.tar", members)
        shards = open_shards(folder, "train")
        assert shards.classes == [] and why in shards.why_unlabelled
