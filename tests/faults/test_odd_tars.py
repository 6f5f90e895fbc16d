"""Tars as nobody should make them: whatever a command is asked to do with one ends in a message."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_sets import contents, image, samples, write_tar
from tar_target import extended, file_of, record

from moco_scale.__main__ import main
from moco_scale.data.open import open_shards
from moco_scale.data.shards import index_place
from moco_scale.data.shards.tar_scan import scan_tar
from moco_scale.utils.errors import UserError

Harm = Callable[[Path], None]
HOSTILE = "x\x1b]0;owned\x07\x1b[2J\n2026-01-01 all is well\u2028caf\udce9"


def prefixed(*parts: bytes) -> Harm:
    """The tar after something else."""

    def harm(path: Path) -> None:
        path.write_bytes(b"".join(parts) + path.read_bytes())

    return harm


def written(*members: tuple[str, bytes]) -> Harm:
    return lambda path: void(write_tar(path, list(members)))


def void(_: object) -> None: ...


def hole(path: Path) -> None:
    path.write_bytes(extended(b"x", 16 << 20))
    os.truncate(path, (16 << 20) + 2048)


def bad_images(path: Path) -> None:
    write_tar(path, [*samples(0, 2), (f"{HOSTILE}.jpg", b"none"), ("é\udce9.png", b"none")])


def cut_behind_odd_names(path: Path) -> None:
    members = [(f"{HOSTILE}{i}.jpg", image(i)) for i in range(3)]
    write_tar(path, [*samples(0, 2), *members])
    os.truncate(path, path.stat().st_size - 10240)


def class_names(path: Path) -> None:
    names = [b"oak\x1b[2J\r", "buche\u2028".encode(), b"a" * 900]
    members = [(f"{i}.jpg", image(i)) for i in range(3)]
    labels = [(f"{i}.cls", name) for i, name in enumerate(names)]
    write_tar(path, [*members, *labels])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def special(kind: bytes) -> Harm:
    def harm(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(f"{HOSTILE}.jpg")
            info.type, info.linkname = kind, "/etc/\x1bpasswd"
            tar.addfile(info)

    return harm


# What stands in the message of a start; "": it starts.
ODD: dict[str, tuple[Harm, str]] = {
    "a large extended header": (hole, "claims 16,777,216 bytes"),
    "a name of 2 MB": (prefixed(extended(b"L", 2 << 20, b"a" * (2 << 20))), "claims 2,097,152"),
    "a record that is none": (prefixed(extended(b"x", 9, b"99 path=a")), "a record at its byte 0"),
    "a global name": (
        prefixed(extended(b"g", len(text := record(b"path", b"x.jpg")), text)),
        "gives all members one path",
    ),
    "an extended header at the end": (
        lambda p: void(p.write_bytes(file_of(5) + extended(b"L", 2, b"a") + bytes(1024))),
        "does not follow",
    ),
    "a sparse file": (special(tarfile.GNUTYPE_SPARSE), "sparse file"),
    "a link": (special(tarfile.SYMTYPE), "as a link"),
    "a pipe in it": (special(tarfile.FIFOTYPE), "as a special file"),
    "names without a suffix": (written(("README", b"a"), ("b", b"b")), "without a suffix.*README"),
    "hidden names": (written(("a/.1.jpg", b"a")), r"hidden ones \(such as a/\.1\.jpg\)"),
    "one name twice in capitals": (written(("1.jpg", b"a"), ("1.JPG", b"b")), "capital letters"),
    "images at two places": (
        written(("1.jpg", b"a"), ("2.jpg", b"b"), ("1.png", b"c")),
        "the key '1' twice",
    ),
    "labels twice": (
        written(("1.jpg", b"a"), ("1.cls", b"1"), ("2.jpg", b"b"), ("1.cls", b"2")),
        "the key '1' twice",
    ),
    "bad images with odd names": (bad_images, ""),
    "a cut behind odd names": (cut_behind_odd_names, "is truncated|cut off"),
    "odd class names": (class_names, ""),
    "a pipe in its place": (pipe, "is no file"),
    "a folder in its place": (directory, "is no file"),
}


@pytest.fixture
def odd(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """A set with an odd tar, and what a start says of it."""
    monkeypatch.setattr(index_place, "MOST_WORKERS", 1)
    harm, words = ODD[request.param]
    write_tar(tmp_path / "set" / "train-0.tar", samples(0, 2))
    write_tar(tmp_path / "set" / "train-1.tar", samples(10, 3))
    harm(tmp_path / "set" / "train-1.tar")
    return tmp_path / "set", words


@pytest.mark.parametrize("odd", ODD, indirect=True)
@pytest.mark.parametrize("place", ["", "train-1.tar"])
def test_a_start_names_it(odd: tuple[Path, str], place: str) -> None:
    folder, words = odd
    if not words:
        assert len(open_shards(folder / place, "train")) > 2
        return
    if place and not (folder / place).is_file():
        words = "is no file|There is no folder|holds no shards|has no index|is empty"
    with pytest.raises(UserError, match=words) as caught:
        open_shards(folder / place, "train")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("odd", ODD, indirect=True)
def test_commands_end_in_a_message(
    odd: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = odd
    commands = [
        ["shard", "--check", str(folder), "--workers", "1"],
        ["inspect", str(folder), "--sheet", str(folder.parent / "sheet.png")],
        ["inspect", str(folder), "--json"],
        ["shard", "--repair", str(folder), "--workers", "1"],
        ["shard", "--check", str(folder), "--workers", "1"],
    ]
    statuses = [main(command) for command in commands]
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
    assert "Traceback" not in said.err
    kept_back = "is no file" in words  # whose images may be good: nothing is changed
    assert statuses[3] == (2 if kept_back else 0)
    assert statuses[4] == (1 if kept_back else 0)
    if words:
        assert statuses[:3] == [1, 2, 2]


def test_labels_behind_all_images_are_those_of_their_keys(tmp_path: Path) -> None:
    images = [(f"{i}.jpg", image(i)) for i in range(6)]
    labels = [(f"{i}.cls", str(5 - i).encode()) for i in (3, 1, 0, 2, 4)]
    path = write_tar(tmp_path / "0.tar", [*images, *labels, ("9.cls", b"7"), ("8.txt", b"a")])
    scan = scan_tar(path)
    assert scan.label.tolist() == [5, 4, 3, 2, 1, -1] and scan.without_image == 2
    assert contents(open_shards(path, "train"))[1] == (image(1), 4)
    # A .cls counts more than the .json of the same key, wherever the two are.
    fields = [(f"{i}.json", b'{"label": 9}') for i in range(6)]
    write_tar(path, [*fields, *labels, *images])
    assert scan_tar(path).label.tolist() == [5, 4, 3, 2, 1, 9]
    # What is kept of a damaged one has its labels too.
    data = path.read_bytes()
    path.write_bytes(data[:-10240])
    assert main(["shard", "--repair", str(tmp_path), "--workers", "1"]) == 0
    labelled = [(image(i), 5 - i if i < 5 else 9) for i in range(6)]
    assert sorted(contents(open_shards(tmp_path, "train"))) == sorted(labelled)
