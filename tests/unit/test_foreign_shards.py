"""Shards that were written elsewhere: what is found in them, and what is refused."""

import gzip
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from moco_scale.__main__ import main
from moco_scale.data import scanned_index, tar_scan
from moco_scale.data.open_shards import has_split, open_shards
from moco_scale.data.recognise import look_into
from moco_scale.data.shard_list import expand_braces, list_shards
from moco_scale.data.shard_set import Shards
from moco_scale.data.tar_scan import scan_tar
from moco_scale.errors import UserError
from moco_scale.evaluation.knn import KnnMonitor, bank_and_queries, open_splits

FORMATS = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "WebP": "WEBP"}


def picture(seed: int, suffix: str = "jpg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, FORMATS[suffix])
    return out.getvalue()


def write_tar(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(
    first: int, count: int, suffix: str = "jpg", label: str = "cls"
) -> list[tuple[str, bytes]]:
    members = []
    for i in range(first, first + count):
        members.append((f"{i:06d}.{suffix}", picture(i, suffix)))
        if label == "cls":
            members.append((f"{i:06d}.cls", str(i % 3).encode()))
        elif label == "json":
            members.append((f"{i:06d}.json", json.dumps({"label": i % 3, "w": 8}).encode()))
        members.append((f"{i:06d}.txt", b"a caption"))
    return members


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Four training shards of 5 samples and one validation shard of 4, without an index."""
    folder = tmp_path / "foreign"
    for n, suffix in enumerate(FORMATS):
        write_tar(folder / f"set-train-{n:04d}.tar", samples(5 * n, 5, suffix))
    write_tar(folder / "set-validation-0000.tar", samples(100, 4))
    return folder


def contents(shards: Shards) -> list[tuple[bytes, int]]:
    return [(bytes(shards.read(i)), int(shards.labels[i])) for i in range(len(shards))]


def expected(first: int, count: int, suffix: str = "jpg") -> list[tuple[bytes, int]]:
    return [(picture(i, suffix), i % 3) for i in range(first, first + count)]


ALL = [pair for n, suffix in enumerate(FORMATS) for pair in expected(5 * n, 5, suffix)]


def test_a_folder_of_tars_is_indexed_on_first_use(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = open_shards(foreign, "train")
    assert contents(shards) == ALL
    assert shards.classes == ["0", "1", "2"]
    assert shards.name == str(foreign)
    assert shards.where(6) == "set-train-0001.tar at byte 4096 (key 000006)"
    assert "indexed 24 pictures in 5 shards" in capfd.readouterr().err
    assert has_split(foreign, "val")
    assert not has_split(foreign, "test")
    assert list((foreign / scanned_index.FOLDER).glob("*/index.json"))

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
    assert not has_split(spec, "val")


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


def test_a_shard_that_braces_name_is_missing(foreign: Path) -> None:
    with pytest.raises(UserError, match=r"names 6 shards, of which 2 are missing.*0004\.tar"):
        open_shards(f"{foreign}/set-train-{{0000..0005}}.tar", "train")
    with pytest.raises(UserError, match=r"names 1 shards, of which 1 are missing"):
        open_shards(f"{foreign}/none-*.tar", "train")
    with pytest.raises(UserError, match="twice"):
        open_shards(f"{foreign}/set-train-0000.tar::{foreign}/set-train-*.tar", "train")


@pytest.mark.parametrize("label", ["cls", "json", ""])
def test_labels(tmp_path: Path, label: str) -> None:
    write_tar(tmp_path / "0.tar", samples(0, 6, label=label))
    shards = open_shards(tmp_path, "train")
    assert shards.labels.tolist() == ([0, 1, 2, 0, 1, 2] if label else [-1] * 6)
    assert shards.classes == (["0", "1", "2"] if label else [])


def test_one_tar_is_a_set(foreign: Path, tmp_path: Path) -> None:
    assert contents(open_shards(foreign / "set-train-0001.tar", "train")) == ALL[5:10]
    assert not has_split(foreign / "set-train-0001.tar", "val")
    flat = write_tar(tmp_path / "flat.tar", samples(0, 3, label=""))
    assert open_shards(flat, "train").labels.tolist() == [-1] * 3
    # Folders are classes: shards of it have labels, and it has none as it is.
    classes = write_tar(tmp_path / "classes.tar", [("ash/0.jpg", picture(0)), ("oak/1.jpg", b"x")])
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
    assert not look_into(path).pictures
    assert read_so_far() - before < 1 << 22


def test_labels_that_are_names_are_one_list_for_all_splits(tmp_path: Path) -> None:
    def named(*names: str) -> list[tuple[str, bytes]]:
        members = []
        for i, name in enumerate(names):
            members += [(f"{i}.jpg", picture(i)), (f"{i}.cls", name.encode())]
        return members

    write_tar(tmp_path / "train-0.tar", named("oak", "ash"))
    write_tar(tmp_path / "train-1.tar", [*named("oak"), ("9.jpg", picture(9))])
    write_tar(tmp_path / "val-0.tar", named("birch", "oak"))
    train, val = open_shards(tmp_path, "train"), open_shards(tmp_path, "val")
    assert train.classes == val.classes == ["ash", "birch", "oak"]
    assert train.labels.tolist() == [2, 0, 2, -1]
    assert val.labels.tolist() == [1, 2]
    write_tar(tmp_path / "train-2.tar", named("7"))
    mixed = open_shards(tmp_path, "train")
    assert mixed.why_unlabelled == "they are numbers in train-2.tar and names in train-0.tar"
    assert mixed.classes == [] and mixed.labels.tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ({"class": 4}, 4),
        ({"label": None, "cls": "2"}, 2),
        ({"other": 1}, -1),
        ([1], -1),
        ({"label": 3.0}, 3),
        ({"label": "3.0"}, 3),
        ({"label": -1}, -1),
    ],
)
def test_fields_of_json(tmp_path: Path, content: Any, label: int) -> None:
    members = [("a.jpg", picture(0)), ("a.json", json.dumps(content).encode())]
    scan = scan_tar(write_tar(tmp_path / "0.tar", members))
    assert (scan.label.tolist(), scan.names, scan.odd) == ([label], [], "")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path: Path, format: int) -> None:
    folder = "/".join(["a long name"] * 8) + "/"  # 95 characters
    if format != tarfile.USTAR_FORMAT:
        folder += "ü" * 60 + "/"
    members = [
        (f"{folder}1.jpg", picture(1)),
        (f"{folder}1.mask.png", b"not the picture"),
        (f"{folder}2.JPG", picture(2)),
        (f"{folder}.hidden.jpg", b"no"),
        ("README", b"no"),
    ]
    path = write_tar(tmp_path / "0.tar", members, format)
    data = path.read_bytes()
    scan = scan_tar(path)
    found = [data[int(o) : int(o) + int(s)] for o, s in zip(scan.offset, scan.size, strict=True)]
    assert found == [picture(1), picture(2)]


def test_samples_without_a_picture_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "0.tar", [*samples(0, 2), ("7.txt", b"x")])
    assert len(open_shards(tmp_path, "train")) == 2
    assert "1 samples hold no picture" in capfd.readouterr().err


ODD_LABELS = {
    "list": ("json", b'{"label": [1, 2]}', r"9\.json, whose label \[1, 2\] is no class"),
    "fraction": ("json", b'{"label": 3.5}', r"whose label 3\.5 is no class"),
    "truth": ("json", b'{"label": true}', "whose label True is no class"),
    "huge": ("cls", b"4294967296", "whose label 4294967296 is no class"),
    "no JSON": ("json", b'{"label": ', r"9\.json, which is not JSON"),
    "empty": ("cls", b" \n", r"9\.cls, whose label is empty"),
    "binary": ("cls", b"\x80\x03K\x01.", r"9\.cls, which is not text"),
    "name": ("cls", b"oak", r"labels that are numbers, 1 in 000010\.cls, and others .*'oak' in 9"),
}


@pytest.mark.parametrize("kind", ODD_LABELS)
def test_an_odd_label_makes_a_set_unlabelled_and_is_named(
    foreign: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    suffix, label, words = ODD_LABELS[kind]
    odd = [("9.jpg", picture(9)), (f"9.{suffix}", label)]
    write_tar(foreign / "set-train-0002.tar", [*samples(10, 5, "png"), *odd])
    shards = open_shards(foreign, "train")
    assert re.match(rf"set-train-0002\.tar holds .*{words}", shards.why_unlabelled)
    assert f"labels are not used: {shards.why_unlabelled}" in capfd.readouterr().err
    assert [data for data, _ in contents(shards)] == [
        data for data, _ in (*ALL[:15], (picture(9), 0), *ALL[15:])
    ]
    assert shards.classes == [] and set(shards.labels.tolist()) == {-1}
    val = open_shards(foreign, "val")  # one list of classes for all splits
    assert val.why_unlabelled == shards.why_unlabelled and set(val.labels.tolist()) == {-1}
    assert shards.subset(np.array([1])).why_unlabelled == shards.why_unlabelled
    bank, queries = bank_and_queries(open_splits(foreign))
    with pytest.raises(UserError, match=r"kNN needs labels.*not used: set-train-0002"):
        KnnMonitor(bank, queries, 8, 1.0, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (0, 1, 4, 5, 2, 3)])
def test_pictures_with_several_dots_in_their_names_are_all_seen(
    tmp_path: Path, order: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    members = [
        *(("a.b/x_1.5.jpg", picture(1)), ("a.b/x_1.5.cls", b"1")),
        *(("a.b/x_1.7.JPG", picture(2)), ("a.b/x_1.7.cls", b"2")),
        *(("a.b/y.jpg", picture(3)), ("a.b/y.cls", b"0")),
    ]
    write_tar(tmp_path / "0.tar", [members[i] for i in order])
    shards = open_shards(tmp_path, "train")
    labelled = [(picture(1), 1), (picture(2), 2), (picture(3), 0)]
    assert contents(shards) == [labelled[i // 2] for i in order[::2]]
    assert shards.place(0).key == "a.b/x_1.5"
    said = capfd.readouterr().err
    assert "names of pictures have several dots (a.b/x_1.5.jpg)" in said
    assert "hold no picture" not in said


def test_pictures_with_several_dots_in_their_names_are_kept_by_a_repair(tmp_path: Path) -> None:
    names = ("x_1.5.jpg", "x_1.5.cls", "x_1.7.jpg", "x_1.7.cls", "y.jpg")
    members = [(n, b"1" if n.endswith("cls") else picture(i)) for i, n in enumerate(names)]
    path = write_tar(tmp_path / "0.tar", members)
    os.truncate(path, int(scan_tar(path).offset[2]) + 10)
    assert main(["shard", "--repair", str(tmp_path), "--workers", "1"]) == 0
    assert contents(open_shards(tmp_path, "train")) == [(picture(0), 1), (picture(2), 1)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        # Which of the two is the picture of the sample that the label belongs to?
        (
            ["0.left.jpg", "0.right.jpg", "0.cls"],
            r"0\.left\.jpg and no 0\.jpg or .*0\.cls belongs to",
        ),
        (
            ["0.jpg", "0.mask.png", "1.mask.png"],
            r"1\.mask\.png in 0\.tar, a picture .* 0\.mask\.png",
        ),
    ],
)
def test_names_that_may_mean_two_things_are_refused(
    tmp_path: Path, names: list[str], words: str
) -> None:
    write_tar(tmp_path / "0.tar", [(name, picture(i)) for i, name in enumerate(names)])
    with pytest.raises(UserError, match=words):
        open_shards(tmp_path, "train")


def test_names_that_mean_different_things_in_two_tars_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.mask.png", b"a mask")])
    write_tar(tmp_path / "1.tar", [("1.mask.png", picture(1))])
    with pytest.raises(UserError, match=r"1\.mask\.png in 1\.tar, .*0\.mask\.png in 0\.tar"):
        open_shards(tmp_path, "train")


def cut(path: Path) -> None:
    os.truncate(path, int(scan_tar(path).offset[3]) + 100)


def cut_between_members(path: Path) -> None:
    os.truncate(path, int(scan_tar(path).offset[2]) - 512)


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(int(scan_tar(path).offset[2]) - 500)
        file.write(b"\xff\xff")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_samples(path: Path) -> None:
    write_tar(path, [])


def no_pictures(path: Path) -> None:
    write_tar(path, [("1.txt", b"a"), ("1.cls", b"0")])


def same_key(path: Path) -> None:
    write_tar(path, [*samples(0, 2), *samples(0, 1)])


def same_name(path: Path) -> None:
    write_tar(path, [("1.jpg", picture(1)), ("1.JPG", picture(2))])


def no_tar(path: Path) -> None:
    path.write_bytes(picture(1) * 20)


def zipped(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def two_in_one(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def empty_picture(path: Path) -> None:
    write_tar(path, [("1.jpg", b"")])


def link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)


def gone(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.tar")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "is truncated"),
        (cut_between_members, "most likely cut off"),
        (damage, r"the header at byte \d+ is not one"),
        (empty, "0 bytes"),
        (no_samples, "empty tar"),
        (no_pictures, "holds no picture: its 1 samples have cls, txt"),
        (same_key, "the key '000000' twice"),
        (same_name, r"1\.JPG twice"),
        (no_tar, "is not a tar"),
        (zipped, "gunzip"),
        (two_in_one, "goes on after its end"),
        (empty_picture, "a picture of 0 bytes"),
        (link, "as a link"),
        (gone, "Cannot read shard"),
    ],
)
def test_a_bad_shard_is_named_at_the_start(
    foreign: Path, harm: Callable[[Path], None], words: str
) -> None:
    bad = foreign / "set-train-0002.tar"
    harm(bad)
    with pytest.raises(UserError, match=words) as caught:
        open_shards(foreign, "train")
    assert str(bad) in str(caught.value)
    bad.unlink()
    write_tar(bad, samples(10, 5, "png"))  # the remedy works
    assert contents(open_shards(foreign, "train")) == ALL


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
    folders = [path for path in (foreign / scanned_index.FOLDER).iterdir() if path.is_dir()]
    # One for each list of names, and none for what a shard was before.
    assert len(folders) == 3


def test_a_damaged_index_is_made_again(foreign: Path) -> None:
    open_shards(foreign, "train")
    (index,) = (foreign / scanned_index.FOLDER).glob("*/train-index.npy")
    index.write_bytes(index.read_bytes()[:-8])
    assert contents(open_shards(foreign, "train")) == ALL


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (foreign / scanned_index.FOLDER).touch()  # no folder can be made here, not even by root
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


def _open_and_report(folder: Path, gate: Any, results: Any) -> None:
    scanned: list[Path] = []

    def counted(path: Path) -> tar_scan.ShardScan:
        scanned.append(path)
        return scan_tar(path)

    scanned_index.scan_tar = counted
    scanned_index._MOST_WORKERS = 1
    gate.wait()
    results.put((len(open_shards(folder, "train")), len(scanned)))


def test_one_of_many_processes_scans(foreign: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(4), context.SimpleQueue()
    ranks = [
        context.Process(target=_open_and_report, args=(foreign, gate, results)) for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    found = [results.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(found) == [(20, 0), (20, 0), (20, 0), (20, 5)]


def test_sizes_beyond_octal_are_read(tmp_path: Path) -> None:
    """Base-256 sizes, as GNU tar writes them for large files: here for a small one."""
    path = write_tar(tmp_path / "0.tar", samples(0, 1))
    data = bytearray(path.read_bytes())
    size = int(data[124:135], 8)
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert scan_tar(path).size.tolist() == [size]
    data[124:136] = b"\x80" + struct.pack(">Q", 1 << 40).rjust(11, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated"):
        scan_tar(path)
