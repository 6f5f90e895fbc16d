"""What the names, labels and headers in tars that were written elsewhere say."""

import gzip
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_sets import ALL, contents, foreign_set, image, samples, write_tar

from moco_scale.__main__ import main
from moco_scale.data.open import open_shards
from moco_scale.data.shards import tar_scan
from moco_scale.data.shards.tar_scan import scan_tar
from moco_scale.evaluation.knn import KnnMonitor, bank_and_queries, open_splits
from moco_scale.utils.errors import UserError


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_set(tmp_path / "foreign")


@pytest.mark.parametrize("label", ["cls", "json", ""])
def test_labels(tmp_path: Path, label: str) -> None:
    write_tar(tmp_path / "0.tar", samples(0, 6, label=label))
    shards = open_shards(tmp_path, "train")
    assert shards.labels.tolist() == ([0, 1, 2, 0, 1, 2] if label else [-1] * 6)
    assert shards.classes == (["0", "1", "2"] if label else [])


def test_labels_that_are_names_are_one_list_for_all_splits(tmp_path: Path) -> None:
    def named(*names: str) -> list[tuple[str, bytes]]:
        members = []
        for i, name in enumerate(names):
            members += [(f"{i}.jpg", image(i)), (f"{i}.cls", name.encode())]
        return members

    write_tar(tmp_path / "train-0.tar", named("oak", "ash"))
    write_tar(tmp_path / "train-1.tar", [*named("oak"), ("9.jpg", image(9))])
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
        ({"label": -5}, -1),
        ({"label": "+0007."}, 7),
        ({"label": 1e5}, 100_000),
        ({"label": 2**31 - 1}, 2**31 - 1),
        ({"score": float("nan"), "label": 1}, 1),
        ({"caption": "cut in a \ud83d", "label": 1}, 1),
    ],
)
def test_fields_of_json(tmp_path: Path, content: Any, label: int) -> None:
    members = [("a.jpg", image(0)), ("a.json", json.dumps(content).encode())]
    scan = scan_tar(write_tar(tmp_path / "0.tar", members))
    assert (scan.label.tolist(), scan.names, scan.odd) == ([label], [], "")


@pytest.mark.parametrize(
    ("suffix", "content", "label"),
    [
        ("cls", struct.pack("<q", 7), 7),
        ("cls", struct.pack("<q", -1), -1),
        ("cls", struct.pack("<i", 7), 7),
        ("cls", b"\xef\xbb\xbf3\r\n", 3),
        ("cls", "3\r\n".encode("utf-16"), 3),
        ("CLS", b"-0", 0),
        ("json", b'\xef\xbb\xbf{"label": 3}\r\n', 3),
        ("cls", "e\u0301cole".encode(), "\xe9cole"),  # composed in another way, the same name
        ("cls", b"airplane", "airplane"),
        ("cls", b"1e5", "1e5"),
        ("cls", b"1_000", "1_000"),
        ("cls", "\u0661".encode(), "\u0661"),
    ],
)
def test_labels_as_other_programs_write_them(
    tmp_path: Path, suffix: str, content: bytes, label: int | str
) -> None:
    members = [("a.jpg", image(0)), (f"a.{suffix}", content)]
    scan = scan_tar(write_tar(tmp_path / "0.tar", members))
    assert scan.odd == ""
    assert label == (scan.names[scan.label[0]] if scan.names else scan.label[0])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path: Path, format: int) -> None:
    folder = "/".join(["a long name"] * 8) + "/"  # 95 characters
    if format != tarfile.USTAR_FORMAT:
        folder += "ü" * 60 + "/"
    members = [
        (f"{folder}1.jpg", image(1)),
        (f"{folder}1.mask.png", b"not the image"),
        (f"{folder}2.JPG", image(2)),
        (f"{folder}.hidden.jpg", b"no"),
        ("README", b"no"),
    ]
    path = write_tar(tmp_path / "0.tar", members, format)
    data = path.read_bytes()
    scan = scan_tar(path)
    found = [data[int(o) : int(o) + int(s)] for o, s in zip(scan.offset, scan.size, strict=True)]
    assert found == [image(1), image(2)]


def test_samples_without_an_image_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "0.tar", [*samples(0, 2), ("7.txt", b"x")])
    assert len(open_shards(tmp_path, "train")) == 2
    assert "1 samples without an image are skipped" in capfd.readouterr().err


ODD_LABELS = {
    "list": ("json", b'{"label": [1, 2]}', r"9\.json, whose label \[1, 2\] is no class"),
    "fraction": ("json", b'{"label": 3.5}', r"whose label 3\.5 is no class"),
    "truth": ("json", b'{"label": true}', "whose label True is no class"),
    "huge": ("cls", b"4294967296", "whose label 4294967296 is no class"),
    "no JSON": ("json", b'{"label": ', r"9\.json, which is not JSON"),
    "empty": ("cls", b" \n", r"9\.cls, whose label is empty"),
    "binary": ("cls", b"\x80\x03K\x01.", r"9\.cls, which is not text"),
    "beyond 64 bits": ("cls", b"9" * 30, "whose label 9999999.* is no class"),
    "thousands of digits": ("cls", b"9" * 9000, "whose label 9999999.* is no class"),
    "digits beyond floats": ("json", b'{"label": 1e999}', "whose label inf is no class"),
    "binary beyond": ("cls", b"\xff\xff\xff\xff\0\0\0\0", "whose label 4294967295 is no class"),
    "deep": ("json", b"[" * 100_000, r"9\.json, which is not JSON \(nested too deeply\)"),
    "a zero byte": ("cls", b"oa\0k", r"9\.cls, which is not text"),
    "a long name": ("cls", b"a" * 20_000, r"9\.cls, whose label has 20,000 characters"),
    "half a character": ("json", b'{"label": "\\udce9"}', r"whose label '\\udce9' is not text"),
    "16 MB": ("json", b'{"label": "' + b"a" * (1 << 24), r"9\.json, which is too large"),
    "a megabyte": ("cls", b"a" * (1 << 20), r"9\.cls, which is too large"),
    "name": ("cls", b"oak", r"labels that are numbers, 1 in 000010\.cls, and others .*'oak' in 9"),
}


@pytest.mark.parametrize("kind", ODD_LABELS)
def test_an_odd_label_makes_a_set_unlabelled_and_is_named(
    foreign: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    suffix, label, words = ODD_LABELS[kind]
    odd = [("9.jpg", image(9)), (f"9.{suffix}", label)]
    write_tar(foreign / "set-train-0002.tar", [*samples(10, 5, "png"), *odd])
    shards = open_shards(foreign, "train")
    assert re.match(rf"set-train-0002\.tar holds .*{words}", shards.why_unlabelled)
    assert f"labels are not used: {shards.why_unlabelled}" in capfd.readouterr().err
    assert [data for data, _ in contents(shards)] == [
        data for data, _ in (*ALL[:15], (image(9), 0), *ALL[15:])
    ]
    assert shards.classes == [] and set(shards.labels.tolist()) == {-1}
    val = open_shards(foreign, "val")  # one list of classes for all splits
    assert val.why_unlabelled == shards.why_unlabelled and set(val.labels.tolist()) == {-1}
    assert shards.subset(np.array([1])).why_unlabelled == shards.why_unlabelled
    bank, queries = bank_and_queries(open_splits(foreign))
    with pytest.raises(UserError, match=r"kNN needs labels.*not used: set-train-0002"):
        KnnMonitor(bank, queries, 8, 1.0, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4, 5), (0, 1, 4, 5, 2, 3), (0, 2, 4, 3, 1, 5), (0, 2, 4, 5, 1, 3)]
)
def test_images_with_several_dots_in_their_names_are_all_seen(
    tmp_path: Path, order: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    members = [
        *(("a.b/x_1.5.jpg", image(1)), ("a.b/x_1.5.cls", b"1")),
        *(("a.b/x_1.7.JPG", image(2)), ("a.b/x_1.7.cls", b"2")),
        *(("a.b/y.jpg", image(3)), ("a.b/y.cls", b"0")),
    ]
    write_tar(tmp_path / "0.tar", [members[i] for i in order])
    shards = open_shards(tmp_path, "train")
    labelled = [(image(1), 1), (image(2), 2), (image(3), 0)]
    assert contents(shards) == [labelled[i // 2] for i in order if i % 2 == 0]
    assert shards.place(0).key == "a.b/x_1.5"
    said = capfd.readouterr().err
    assert "names of images have several dots (a.b/x_1.5.jpg)" in said
    assert "hold no image" not in said


def test_images_with_several_dots_in_their_names_are_kept_by_a_repair(tmp_path: Path) -> None:
    names = ("x_1.5.jpg", "x_1.5.cls", "x_1.7.jpg", "x_1.7.cls", "y.jpg")
    members = [(n, b"1" if n.endswith("cls") else image(i)) for i, n in enumerate(names)]
    path = write_tar(tmp_path / "0.tar", members)
    os.truncate(path, int(scan_tar(path).offset[2]) + 10)
    assert main(["shard", "--repair", str(tmp_path), "--workers", "1"]) == 0
    assert contents(open_shards(tmp_path, "train")) == [(image(0), 1), (image(2), 1)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        # Which of the two is the image of the sample that the label belongs to?
        (
            ["0.left.jpg", "0.right.jpg", "0.cls"],
            r"0\.left\.jpg and no 0\.jpg or .*0\.cls belongs to",
        ),
        (
            ["0.jpg", "0.mask.png", "1.mask.png"],
            r"1\.mask\.png in 0\.tar, an image .* 0\.mask\.png",
        ),
    ],
)
def test_names_that_may_mean_two_things_are_refused(
    tmp_path: Path, names: list[str], words: str
) -> None:
    write_tar(tmp_path / "0.tar", [(name, image(i)) for i, name in enumerate(names)])
    with pytest.raises(UserError, match=words):
        open_shards(tmp_path, "train")


def test_names_that_mean_different_things_in_two_tars_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", image(0)), ("0.mask.png", b"a mask")])
    write_tar(tmp_path / "1.tar", [("1.mask.png", image(1))])
    with pytest.raises(UserError, match=r"1\.mask\.png in 1\.tar, .*0\.mask\.png in 0\.tar"):
        open_shards(tmp_path, "train")


def test_a_sample_has_only_so_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"frame.{i}.jpg", image(i)) for i in range(4)]
    path = write_tar(tmp_path / "0.tar", members)
    assert len(scan_tar(path).offset) == 4
    monkeypatch.setattr(tar_scan, "MEMBERS_OF_A_SAMPLE", 3)
    with pytest.raises(UserError, match=r"more than 3 files .* such as frame\.3\.jpg"):
        scan_tar(path)


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


def no_images(path: Path) -> None:
    write_tar(path, [("1.txt", b"a"), ("1.cls", b"0")])


def same_key(path: Path) -> None:
    write_tar(path, [*samples(0, 2), *samples(0, 1)])


def same_name(path: Path) -> None:
    write_tar(path, [("1.jpg", image(1)), ("1.JPG", image(2))])


def no_tar(path: Path) -> None:
    path.write_bytes(image(1) * 20)


def zipped(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def two_in_one(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def empty_image(path: Path) -> None:
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
        (no_images, "holds no image: its 1 samples have cls, txt"),
        (same_key, "the key '000000' twice"),
        (same_name, r"1\.JPG beside 1\.jpg"),
        (no_tar, "is not a tar"),
        (zipped, "gunzip"),
        (two_in_one, "goes on after its end"),
        (empty_image, "an image of 0 bytes"),
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
