"""Sources that are damaged and options that contradict: one clear error, and nothing half done."""

import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image
from shard_runs import Command

from moco_scale.data.tools import writer


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "out" / "shards", capsys)


def pack(folder: Path, tar: Path) -> bytes:
    """A tar of the folder, compressed if its name says so; returns its bytes."""
    with tarfile.open(tar, "w:gz" if tar.suffix == ".gz" else "w") as archive:
        archive.add(folder, "images")
    return tar.read_bytes()


def test_no_source(command: Command, tmp_path: Path) -> None:
    assert f"There is no source {tmp_path / 'nothing'}" in command.refused(tmp_path / "nothing")


def test_no_images(command: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "The folder is empty" in command.refused(empty)
    (empty / "notes.txt").touch()
    message = command.refused(empty)
    assert "1 file that is no image by name: 1 x .txt (as notes.txt)" in message
    assert "The folder holds notes.txt" in message
    pack(empty, tmp_path / "none.tar")
    assert "none.tar holds no images" in command.refused(tmp_path / "none.tar")
    shutil.move(tmp_path / "none.tar", empty)
    assert f"--source {empty / 'none.tar'}" in command.refused(empty)


@pytest.mark.parametrize("content", [b"", b"just a text", bytes(range(256)) * 40])
def test_not_a_tar(command: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "x.tar is not a tar" in command.refused(tmp_path / "x.tar")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_cut_anywhere(
    command: Command, image_folder: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    whole = pack(image_folder, path)
    if suffix == ".tar":
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        cuts = [
            512 * 3 + 100,
            512 * 9,
            len(whole) // 2,
            last.offset,
            last.offset + 100,
            end - 600,
            end,
        ]
    else:
        cuts = [20, len(whole) // 2, len(whole) - 4]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        message = command.refused(path)
        assert "is truncated" in message or "cut off" in message, f"cut at {cut} of {len(whole)}"


def test_a_damaged_header_in_the_middle_of_a_tar(
    command: Command, image_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.tar"
    whole = bytearray(pack(image_folder, path))
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[20].offset
    whole[middle + 10] ^= 0xFF
    path.write_bytes(whole)
    assert f"is damaged: the header at byte {middle} is not one" in command.refused(path)


def test_a_damaged_gzip(command: Command, image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    whole = bytearray(pack(image_folder, path))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    assert "is truncated or damaged" in command.refused(path)


def test_a_truncated_tar_in_a_tar(command: Command, image_folder: Path, tmp_path: Path) -> None:
    inner = pack(image_folder / "train" / "ash", tmp_path / "ash.tar")
    for cut in (len(inner) // 2, 20 * 512):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in ("n00000001.tar", "n00000002.tar"):
                member = tarfile.TarInfo(name)
                data = inner[:cut] if name == "n00000001.tar" else inner
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        assert "n00000001.tar in " in command.refused(tmp_path / "x.tar")


def test_links_in_a_tar(command: Command, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train" / "ash" / "link.jpg").symlink_to("000.jpg")
    pack(image_folder, tmp_path / "x.tar")
    message = command.refused(tmp_path / "x.tar")
    assert "link.jpg -> 000.jpg" in message and "--dereference" in message


def test_the_same_name_twice(command: Command, image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(image_folder, "p")
        archive.add(image_folder / "train" / "ash" / "001.jpg", "./p/train/ash/001.jpg")
    assert "p/train/ash/001.jpg twice" in command.refused(tmp_path / "x.tar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_source_without_permission(command: Command, image_folder: Path) -> None:
    locked = image_folder / "train" / "ash"
    locked.chmod(0)
    try:
        assert f"cannot be read: {locked} (Permission denied)" in command.refused(image_folder)
    finally:
        locked.chmod(0o755)


def test_an_image_that_vanishes(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = image_folder / "val" / "ash" / "000.jpg"
    original = writer.random_order

    def order(*args: Any) -> Any:
        gone.unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(writer, "random_order", order)
    assert f"Cannot read {gone}" in command.refused(image_folder, workers=2)


def test_only_empty_or_broken_images(command: Command, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.jpg").touch()
    assert "None of the 3 train images can be used: 3 x empty file" in command.refused(
        tmp_path / "in"
    )
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"x")
    assert "None of the 3 train images" in command.refused(tmp_path / "in", "--verify")


def test_folders_that_say_nothing_clear(command: Command, image_folder: Path) -> None:
    write_image(image_folder / "train" / "loose.jpg", seed=50)
    message = command.refused(image_folder)
    assert "1 images lie in no class folder (the first: loose.jpg)" in message
    assert "--unlabelled" in message
    (image_folder / "train" / "loose.jpg").unlink()
    (image_folder / "val" / "ash").rename(image_folder / "val" / "oak")
    message = command.refused(image_folder)
    assert "4 images are of a class that no training image has: oak" in message
    shutil.rmtree(image_folder / "val")
    write_image(image_folder / "val" / "x.jpg", seed=51)
    message = command.refused(image_folder)
    assert "--val-ground-truth" in message and "--train-only" in message
    shutil.rmtree(image_folder / "train")
    write_image(image_folder / "test" / "x.jpg", seed=51)
    assert "no train folder" in command.refused(image_folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("1\n2\n3\n4\n", "has 4 lines, and there are 12 validation images"),
        ("1\n" * 12, "that no training image has: n02119789"),
        ("0\n" * 12, "0 is not an ILSVRC2012 id"),
        ("000.jpg ash\n", "says nothing about 001.jpg"),
        (
            "".join(f"{i:03d}.jpg oak\n" for i in range(12)),
            "that no training image has: oak",
        ),
        ("".join(f"{i:03d}.jpg 3\n" for i in range(12)), "that no training image has: 3"),
        ("a.jpg\nb.jpg ash\n", "line 1"),
    ],
)
def test_a_ground_truth_that_does_not_fit(
    command: Command, image_folder: Path, tmp_path: Path, text: str, words: str
) -> None:
    flat = image_folder / "val"
    shutil.rmtree(flat)
    for i in range(12):
        write_image(flat / f"{i:03d}.jpg", seed=60 + i)
    (tmp_path / "truth.txt").write_text(text)
    truth = ("--val-ground-truth", str(tmp_path / "truth.txt"))
    assert words in command.refused(image_folder, *truth)


def test_a_ground_truth_that_cannot_be_read(
    command: Command, image_folder: Path, tmp_path: Path
) -> None:
    shutil.rmtree(image_folder / "val")
    write_image(image_folder / "val" / "a.jpg", seed=1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "kit.tar.gz").write_bytes(b"\x1f\x8b nonsense")
    for name, words in {
        "nothing": "There is no ground-truth file",
        "binary": "is not a text",
        "kit.tar.gz": "Cannot read",
        "images": "holds no ILSVRC2012_validation_ground_truth.txt",
    }.items():
        assert words in command.refused(image_folder, "--val-ground-truth", str(tmp_path / name))


def test_options_that_contradict(command: Command, image_folder: Path) -> None:
    assert "--short-side too" in command.refused(image_folder, "--quality", "80")
    flat = image_folder / "train" / "ash"
    assert "--per-class needs" in command.refused(flat, "--per-class", "2")
    for wrong in ("0", "-5", "12XB", "5M", "MB", ""):
        with pytest.raises(SystemExit):
            command(image_folder, "--shard-size", wrong)
    assert command.around() == {}
