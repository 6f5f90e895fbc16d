"""A zip as a source: read in place, whatever it says of itself."""

import io
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_runs import CLASSES, Command, image_bytes, packed, splits, told

from moco_scale.data.tools import source_zip

Shown = pytest.CaptureFixture[str]


@pytest.fixture
def command(tmp_path: Path, capsys: Shown) -> Command:
    return Command(tmp_path / "out" / "shards", capsys)


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def listed(whole: bytes | bytearray, number: int) -> int:
    """Where the record of a file in the list begins."""
    at = -1
    for _ in range(number + 1):
        at = whole.index(b"PK\x01\x02", at + 1)
    return at


def written(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (*out.glob("*.tar"), *out.glob("*.npy"))}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_and_a_folder_give_the_same_shards(
    command: Command, image_folder: Path, tmp_path: Path, method: int
) -> None:
    assert command(image_folder) == 0
    expected = written(command.out)
    packing = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path, "images")
    with zipfile.ZipFile(packing) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    zipped(tmp_path / "x.zip", files, method)
    before = (tmp_path / "x.zip").read_bytes()
    assert command(tmp_path / "x.zip", "--overwrite", workers=2) == 0
    assert written(command.out) == expected
    assert (tmp_path / "x.zip").read_bytes() == before


def test_what_stands_before_a_zip_and_wide_sizes(
    command: Command, image_folder: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted((image_folder / "train").rglob("*.jpg")):
            name = str(path.relative_to(image_folder))
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(path.read_bytes())
    (tmp_path / "y.zip").write_bytes(b"#!/bin/sh\n" * 9 + (tmp_path / "x.zip").read_bytes())
    for name, options in (("x.zip", ()), ("y.zip", ("--overwrite",))):
        assert command(tmp_path / name, *options) == 0
        assert splits(command.out) == {"train": CLASSES}


def test_a_zip_of_very_many_files(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # 65,535: more need a list of zip64
    path = packed(image_folder, "zip")
    assert b"PK\x06\x06" in path.read_bytes()
    assert command(path) == 0
    assert splits(command.out)["train"] == CLASSES


def test_names_lead_nowhere_and_may_be_old(command: Command, tmp_path: Path) -> None:
    names = ("../../../a/1.jpg", "/b/2.jpg", "c\\3.jpg", "d/../e/4.jpg", "\u00fc/5.jpg")
    zipped(tmp_path / "x.zip", {n: image_bytes(i) for i, n in enumerate(names)})
    (tmp_path / "dos.zip").write_bytes(_with_437(names))
    for name, options in (("x.zip", ()), ("dos.zip", ("--overwrite",))):
        assert command(tmp_path / name, *options) == 0
        assert splits(command.out)["train"] == dict.fromkeys(("a", "b", "c", "e", "\u00fc"), 1)
    assert not (tmp_path / "a").exists()


def _with_437(names: tuple[str, ...]) -> bytes:
    """As DOS wrote it: code page 437, and no flag that says otherwise."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name.replace("\u00fc", "?"), image_bytes(i))
    return stream.getvalue().replace(b"?/5.jpg", b"\x81/5.jpg")


def test_what_cannot_be_read_of_a_zip_is_left_out_by_name(
    command: Command, capsys: Shown, tmp_path: Path
) -> None:
    files = {f"a/{name}.jpg": image_bytes(1) for name in ("good", "locked", "lzma", "bad", "lie")}
    path = zipped(tmp_path / "x.zip", {**files, "b/good.jpg": image_bytes(2)})
    whole = bytearray(path.read_bytes())
    whole[listed(whole, 1) + 8] |= 1  # encrypted
    whole[listed(whole, 2) + 10] = 14
    local = struct.unpack_from("<L", whole, listed(whole, 3) + 42)[0]
    whole[local + 60] ^= 0xFF
    struct.pack_into("<L", whole, listed(whole, 4) + 24, 1 << 30)
    path.write_bytes(whole)
    text = told(command, capsys, path)
    assert splits(command.out)["train"] == {"a": 1, "b": 1}
    for reason in (
        "1 x encrypted in the zip (as train: a/locked.jpg)",
        "1 x packed in the zip by method 14: stored and deflated are read (as train: a/lzma.jpg)",
        "1 x damaged in the zip: its checksum is wrong (as train: a/bad.jpg)",
        "1 x damaged in the zip: two sizes are listed (as train: a/lie.jpg)",
    ):
        assert reason in text


def test_what_inflates_like_no_image(command: Command, capsys: Shown, tmp_path: Path) -> None:
    files = {"a/bomb.jpg": bytes(65 << 20), "a/1.jpg": image_bytes(1), "b/1.jpg": b"\xff\xd8\xff"}
    path = zipped(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED)
    assert "made to fill memory: 68,157,440 bytes" in told(command, capsys, path)
    assert splits(command.out)["train"] == {"a": 1, "b": 1}


def test_no_more_is_inflated_than_is_listed() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = bomb.compress(bytes(1 << 24)) + bomb.flush()
    with pytest.raises(ValueError, match="not of the size that is listed"):
        source_zip.unpack(data, 1000, source_zip.Packed(len(data), True, 0))


def test_files_that_share_bytes(command: Command, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {f"a/{i}.jpg": image_bytes(1) for i in range(3)})
    whole = bytearray(path.read_bytes())
    first = struct.unpack_from("<L", whole, listed(whole, 0) + 42)[0]
    struct.pack_into("<L", whole, listed(whole, 2) + 42, first)
    path.write_bytes(whole)
    assert "files that share bytes" in command.refused(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[: len(b) // 2], "the list of its files is missing"),
        (lambda b: b[:-22], "the list of its files is missing"),
        (lambda b: b[:-22] + b"PK\5\6\1\0\1\0" + b[-14:], "last of several parts"),
        (lambda b: b[:-10] + b"\xff\xff\xff\x7f" + b[-6:], "does not lie in it"),
        (lambda b: b.replace(b"PK\1\2", b"PK\7\7", 1), "something else"),
        (lambda b: b[:5] + b.replace(b"PK\3\4", b"PK\7\7")[5:], "not where the list of files says"),
    ],
)
def test_a_damaged_zip(
    command: Command, tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    path = zipped(tmp_path / "x.zip", {f"a/{i}.jpg": image_bytes(i) for i in range(3)})
    path.write_bytes(change(path.read_bytes()))
    assert words in command.refused(path)


def test_a_zip_of_a_folder_in_a_folder_is_not_looked_into(
    command: Command, capsys: Shown, image_folder: Path
) -> None:
    packed(image_folder, "zip").rename(image_folder / "train" / "ash" / "more.zip")
    text = told(command, capsys, image_folder)
    assert "1 x .zip (as train/ash/more.zip)" in text and "name it as the --source" in text
