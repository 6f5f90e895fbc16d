"""Sources as people have them: what is an image or a class, and what is passed over and said."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image
from PIL import Image
from shard_runs import CLASSES, Command, image_bytes, packed, splits, told

from moco_scale.__main__ import main
from moco_scale.data.images.formats import START_BYTES, image_kind
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.tools import shard_file, source_tar
from moco_scale.evaluation import knn

Shown = pytest.CaptureFixture[str]

JUNK = (
    *("@eaDir/000.jpg", "@eaDir/SYNO@.fileindexdb", ".AppleDouble/000.jpg", "__MACOSX/a/._1.jpg"),
    *("._000.jpg", "Thumbs.db", "thumbs.db", ".ipynb_checkpoints/000-checkpoint.jpg"),
    *("$RECYCLE.BIN/x.jpg", "lost+found/x.jpg", ".hidden.jpg", "System Volume Information/x.jpg"),
)


@pytest.fixture
def command(tmp_path: Path, capsys: Shown) -> Command:
    return Command(tmp_path / "out" / "shards", capsys)


@pytest.mark.parametrize("how", ["folder", "tar", "zip"])
def test_what_systems_leave_is_no_image_and_no_class(
    command: Command, capsys: Shown, image_folder: Path, how: str
) -> None:
    for below in ("", "train", "train/ash"):
        for name in JUNK:
            path = image_folder / below / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"junk")
    text = told(command, capsys, packed(image_folder, how))
    assert splits(command.out)["train"] == CLASSES
    assert len(IndexedShards.open(command.out, "val")) == 12
    for name in ("@eaDir", ".AppleDouble", "__MACOSX", "._…", "Thumbs.db", ".ipynb_checkpoints"):
        assert name in text
    assert "hidden or left by a system" in text


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Val"),
        ("TRAIN", "VALIDATION"),
        ("Training", "Testing"),
        ("training", "validation"),
        ("train", "test"),
        ("train", "dev"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
    ],
)
def test_split_folders_of_other_names(
    command: Command, capsys: Shown, image_folder: Path, train: str, val: str
) -> None:
    (image_folder / "train").rename(image_folder / "1")
    (image_folder / "1").rename(image_folder / train)
    (image_folder / "val").rename(image_folder / val)
    text = told(command, capsys, image_folder)
    assert splits(command.out) == {"train": CLASSES, "val": dict.fromkeys(CLASSES, 4)}
    assert train == "train" or f"{train} is taken as train" in text
    assert f"{val} is taken as val" in text or f"{val} (12 images) is taken as val" in text


def test_splits_unpacked_into_folders_of_their_own_names(
    command: Command, image_folder: Path
) -> None:
    for split in ("train", "val"):
        (image_folder / split).rename(image_folder / "x")
        (image_folder / split).mkdir()
        (image_folder / "x").rename(image_folder / split / split)
    assert command(image_folder) == 0
    assert splits(command.out) == {"train": CLASSES, "val": dict.fromkeys(CLASSES, 4)}


def test_test_images_are_val_only_where_they_can_be(
    command: Command, capsys: Shown, image_folder: Path
) -> None:
    shutil.copytree(image_folder / "val", image_folder / "test")
    text = told(command, capsys, image_folder)
    assert f"ignored in {image_folder}: test (12 images)" in text
    shutil.rmtree(image_folder / "val")
    (image_folder / "test" / "ash").rename(image_folder / "test" / "oak")
    text = told(command, capsys, image_folder, "--overwrite")
    assert "test (12 images) is not used: train has no class oak" in text
    write_image(image_folder / "test" / "x.jpg", seed=1)
    text = told(command, capsys, image_folder, "--overwrite")
    assert "test (13 images) is not used: not all of its images lie in class folders" in text
    assert splits(command.out) == {"train": CLASSES}


def test_folders_that_could_be_splits_or_classes_are_named(
    command: Command, image_folder: Path
) -> None:
    shutil.copytree(image_folder / "val", image_folder / "Validation")
    message = command.refused(image_folder)
    assert "Validation and val, which both mean val" in message
    classes = image_folder / "train"
    shutil.copytree(classes / "ash", classes / "train")  # vehicles, say
    message = command.refused(classes)
    assert "has train beside ash and birch and cedar" in message and "called train" in message
    shutil.rmtree(image_folder / "val")
    shutil.rmtree(image_folder / "Validation")
    assert command(image_folder) == 0
    assert splits(command.out) == {"train": {**CLASSES, "train": 8}}


def test_classes_that_differ_in_spelling_alone(
    command: Command, capsys: Shown, tmp_path: Path
) -> None:
    names = {"train": ("na\u0308h", "n\u00e4h", "Cat", "cat"), "val": ("na\u0308h", "cat")}
    for split, folders in names.items():
        for n, name in enumerate(folders):
            write_image(tmp_path / "in" / split / name / "0.jpg", seed=n)
    text = told(command, capsys, tmp_path / "in")
    assert splits(command.out) == {
        "train": {"Cat": 1, "cat": 1, "n\u00e4h": 2},
        "val": {"Cat": 0, "cat": 1, "n\u00e4h": 1},
    }
    assert "spell their letters (NFC, NFD) are one class: n\u00e4h" in text
    assert "classes whose names differ in capitals alone: Cat and cat" in text
    shutil.rmtree(tmp_path / "in" / "train" / "cat")
    message = command.refused(tmp_path / "in", "--overwrite")
    assert "no training image has: cat (there is Cat: capitals count)" in message


def test_what_is_no_image_is_counted_with_what_to_do(
    command: Command, capsys: Shown, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    write_image(folder / "a" / "1.jpg", seed=1)
    write_image(folder / "a" / "1.JPG", seed=2)
    (folder / "a" / "2.avif").write_bytes(image_bytes(3, "AVIF"))
    (folder / "a" / "none").write_bytes(image_bytes(4, "WEBP"))
    (folder / "a" / "BMW").write_bytes(b"BMW makes cars")
    for i in range(40):
        (folder / "a" / f"{i}.HEIC").write_bytes(b"heic")
    (folder / "notes.txt").touch()
    text = told(command, capsys, folder, "--verify")
    with tarfile.open(command.out / "train-000000.tar") as tar:
        names = {name for name in tar.getnames() if not name.endswith(".cls")}
    assert len(names) == 4
    assert sorted(os.path.splitext(name)[1] for name in names) == [".avif", ".jpg", ".jpg", ".webp"]
    assert "42 files that are no image by name: 40 x .heic (as a/" in text
    assert "1 x no suffix (as a/BMW)" in text and "1 x .txt (as notes.txt)" in text
    assert "HEIC is not decoded here: convert it" in text


def test_only_files_that_are_no_images(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.heic").touch()
    message = command.refused(tmp_path / "in")
    assert "1 x .heic (as a.heic)" in message and "convert it" in message


@pytest.mark.parametrize(
    "start",
    [b"RIFF\0\0\0\0WAVEfmt ", b"BMW makes cars 2024", b"P6", b"\0\0\0\x20ftypheic", b"II", b""],
)
def test_what_only_begins_like_an_image(start: bytes) -> None:
    assert image_kind(start) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_kinds_of_images(kind: str) -> None:
    assert image_kind(image_bytes(1, kind)[:START_BYTES]) == kind


def test_files_that_cannot_be_taken_are_listed_and_the_others_are_taken(
    command: Command, capsys: Shown, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ash = image_folder / "train" / "ash"
    (ash / "gone.jpg").symlink_to("nowhere.jpg")
    (ash / "round.jpg").symlink_to("round.jpg")
    (ash / "nowhere").symlink_to("nowhere-else")
    os.mkfifo(ash / "pipe.jpg")
    (ash / "lfs.jpg").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    (ash / "secret.jpg").write_bytes(b"x")
    opener = shard_file.without_waiting

    def locked(path: str, flags: int) -> int:  # root may read everything
        if path.endswith("secret.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return opener(path, flags)

    monkeypatch.setattr(shard_file, "without_waiting", locked)
    text = told(command, capsys, image_folder)
    assert splits(command.out)["train"] == CLASSES
    lines = (command.out / "left_out.jsonl").read_text().splitlines()
    reasons = {line["name"]: line["reason"] for line in map(json.loads, lines)}
    assert reasons.keys() == {
        f"ash/{name}.jpg" for name in ("gone", "round", "pipe", "lfs", "secret")
    }
    assert reasons["ash/gone.jpg"] == "a link to nothing"
    assert "Too many levels" in reasons["ash/round.jpg"]
    assert "a pipe" in reasons["ash/pipe.jpg"]
    assert "git lfs pull" in reasons["ash/lfs.jpg"]
    assert reasons["ash/secret.jpg"] == "cannot be read: Permission denied"
    assert "left out 5 images" in text and "1 x a link to nothing (as train: ash/gone" in text


def test_a_folder_of_lfs_pointers(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{i}\nsize 9\n"
        (tmp_path / "in" / f"{i}.png").write_text(text)
    message = command.refused(tmp_path / "in")
    assert "None of the 3 train images can be used: 3 x a pointer of Git LFS" in message


def test_names_that_no_terminal_takes(command: Command, capsys: Shown, tmp_path: Path) -> None:
    """Latin-1 bytes, escape codes, line ends and 255 bytes, in classes and in files."""
    folder = os.fsencode(tmp_path / "in")
    for name in (b"caf\xe9", b"a\x1b[2J\nb", b"a" * 255, "x\u2028y".encode(), b"..."):
        os.makedirs(folder + b"/" + name)
        for file in (b"1.jpg", b"1.JPG", b"\xff\n.jpg", b"b" * 251 + b".jpg"):
            path = folder + b"/" + name + b"/" + file
            with open(path, "wb") as stream:
                stream.write(image_bytes(len(path)))
    with open(folder + b"/caf\xe9/bad\xe9.jpg", "wb") as stream:
        stream.write(b"bad")
    text = told(command, capsys, tmp_path / "in", "--verify")
    assert "(as train: caf\\xe9/bad\\xe9.jpg)" in text and "\x1b" not in text
    found = splits(command.out)["train"]
    # What begins with a dot is hidden.
    assert found == dict.fromkeys(("caf\\xe9", "a\x1b[2J\nb", "a" * 255, "x\u2028y"), 4)
    (line,) = (command.out / "left_out.jsonl").read_text().splitlines()
    assert os.fsencode(json.loads(line)["name"]) == b"caf\xe9/bad\xe9.jpg"
    sheet = tmp_path / "sheet.png"
    for arguments in (
        ["shard", "--check", str(command.out), "--workers", "1"],
        ["inspect", str(command.out), "--json"],
        ["inspect", str(command.out), "--sheet", str(sheet)],
    ):
        assert main(arguments) == 0
    assert Image.open(sheet).width < 1500


def test_a_source_and_an_output_that_are_not_utf_8(
    command: Command, capsys: Shown, tmp_path: Path
) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_image(source / "a" / "1.jpg", seed=1)
    command.out = command.out.with_name(source.name)
    assert r"caf\xe9 is complete" in told(command, capsys, source)
    assert main(["inspect", str(command.out)]) == 0
    assert r"from caf\xe9" in capsys.readouterr().out


def test_a_very_long_class_name_on_a_sheet(tmp_path: Path, capsys: Shown) -> None:
    for i in range(8):
        write_image(tmp_path / "in" / "class" / f"{i}.jpg", seed=i)
    command = Command(tmp_path / "out", capsys)
    assert command(tmp_path / "in") == 0
    index = command.out / "index.json"
    index.write_text(index.read_text().replace('"class"', '"' + "long " * 190 + '"'))
    assert main(["inspect", str(command.out), "--sheet", str(tmp_path / "sheet.png")]) == 0


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed without recursion, which shutil and pytest would use."""
    (tmp_path / "deep").mkdir()
    yield tmp_path / "deep"
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_folders_nested_deeper_than_recursion_goes(command: Command, deep: Path) -> None:
    _nest(deep, "a", 1500)
    assert command(deep) == 0
    _nest(deep, "b" * 100, 60)  # deeper than a path may be long
    assert "File name too long" in command.refused(deep, "--overwrite")


def _nest(top: Path, name: str, depth: int) -> None:
    """An image in so many folders within each other."""
    here = os.getcwd()
    os.chdir(top)
    try:
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        Path("1.jpg").write_bytes(image_bytes(1))
    finally:
        os.chdir(here)


def test_links_that_lead_to_each_other_end(command: Command, tmp_path: Path) -> None:
    names = [f"f{i}" for i in range(9)]
    for name in names:
        write_image(tmp_path / "in" / name / "1.jpg", seed=1)
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / "in" / name / f"to-{other}").symlink_to(tmp_path / "in" / other)
    assert "in more than 64 ways" in command.refused(tmp_path / "in")


@pytest.mark.parametrize("option", ["source", "out", "check", "repair", "val-source"])
def test_an_empty_name_is_not_this_folder(
    option: str, image_folder: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder)
    with pytest.raises(SystemExit) as ended:
        main(["shard", f"--{option}", ""])
    assert ended.value.code == 2 and "the name is empty" in capsys.readouterr().err
    assert main(["inspect", ""]) == 2


def test_an_output_in_the_source_is_no_part_of_it(
    command: Command, capsys: Shown, image_folder: Path
) -> None:
    onto_itself = ["--source", str(image_folder), "--out", f"{image_folder}/", "--overwrite"]
    assert main(["shard", *onto_itself]) == 2
    assert "is the source itself" in capsys.readouterr().err
    assert len(list(image_folder.rglob("*.jpg"))) == 36
    command.out = image_folder / "train" / "shards"
    for options in ((), ("--overwrite",)):
        assert ".tar" not in told(command, capsys, image_folder, *options)
        assert splits(command.out)["train"] == CLASSES


def test_a_source_that_is_no_file(command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no file and no folder" in command.refused(tmp_path / "pipe")
    (tmp_path / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(600))
    assert "is a 7-Zip archive: unpack it" in command.refused(tmp_path / "x.7z")


def test_outputs_and_sources_that_cannot_be(
    command: Command, capsys: Shown, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "round").symlink_to("round")
    for source, words in (
        (tmp_path / "round", "There is no source"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert words in command.refused(source)
    for out, words in (
        ("/", "is the root of a disk"),
        (str(tmp_path / "round"), "is no folder"),
        (str(tmp_path / ("x" * 300)), "File name too long"),
    ):
        assert main(["shard", "--source", str(image_folder), "--out", out]) == 2
        assert words in capsys.readouterr().err


def test_a_tar_that_is_two_or_a_bomb(
    command: Command, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = packed(image_folder, "tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole + whole)
    assert "goes on after its end" in command.refused(tar)
    monkeypatch.setattr(source_tar, "SOURCE_INFLATION_FROM", 0)
    monkeypatch.setattr(source_tar, "SOURCE_INFLATION", 10)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("a/1.jpg")
        member.size = 1 << 20
        archive.addfile(member, io.BytesIO(bytes(1 << 20)))
    assert "made to fill disks" in command.refused(tmp_path / "x.tar.gz")


def test_two_compressed_tars_of_one_name(
    command: Command, capsys: Shown, image_folder: Path, tmp_path: Path
) -> None:
    tars = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        tars.append(tmp_path / split / "images.tar.gz")
        with tarfile.open(tars[-1], "w:gz") as archive:
            archive.add(image_folder / split, "images")
    told(command, capsys, tars[0], "--val-source", str(tars[1]))
    assert splits(command.out) == {"train": CLASSES, "val": dict.fromkeys(CLASSES, 4)}


def test_knn_says_which_classes_nobody_votes_for(
    command: Command, capsys: Shown, image_folder: Path
) -> None:
    assert command(image_folder, "--shard-size", "1") == 0
    bank, queries = knn.bank_and_queries(knn.open_splits(command.out))
    kept = bank.subset((bank.labels != 1).nonzero()[0])
    pixels: Any = (16, 1.0, (0.5,) * 3, (0.5,) * 3)
    assert knn.KnnMonitor(bank, queries, *pixels).hopeless == ""
    assert (
        "4 of the 12 val images are of 1 class that the 16 train images of the bank lack "
        "(first: birch)" in knn.KnnMonitor(kept, queries, *pixels).hopeless
    )
