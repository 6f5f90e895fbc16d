"""What `python -m moco_scale inspect` says of a folder of shards, and the sheet it draws."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import make_shards
from conftest import write_image
from PIL import Image

from moco_scale.__main__ import main
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.tools.contact_sheet import contact_sheet


def test_it_counts_what_is_there(tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_shards), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]
    files = list(tiny_shards.glob("train-*.tar"))
    shards = IndexedShards.open(tiny_shards)
    sizes = sorted(len(shards.read(i)) for i in range(32))
    assert (train["images"], train["shards"]) == (32, len(files))
    assert train["bytes"] == sum(path.stat().st_size for path in files)
    assert (train["classes"], train["per_class"]) == (["ash", "birch"], [16, 16])
    assert train["unlabelled"] == train["unreadable"] == 0
    assert train["formats"] == {"jpeg": 32} and train["sampled"] == 32
    assert [train["image_bytes"][i] for i in (0, -1)] == [sizes[0], sizes[-1]]
    assert (train["width"], train["height"]) == ([40] * 5, [32] * 5)
    assert found["splits"]["val"]["images"] == 8
    assert main(["inspect", str(tiny_shards)]) == 0
    text = capsys.readouterr().out
    for part in ("train: 32 images in 4 shards", "median 40 x 32", "jpeg 100 %", "ash 16"):
        assert part in text


def test_shards_of_others_without_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(6):
        write_image(tmp_path / "flat" / f"{i}.{('png', 'webp')[i % 2]}", seed=i)
    shards = make_shards(tmp_path / "flat", tmp_path / "shards")
    for path in (*shards.glob("*.npy"), shards / "index.json"):
        path.unlink()
    assert main(["inspect", str(shards), "--sheet", str(tmp_path / "sheet.png")]) == 0
    text = capsys.readouterr().out
    assert "6 images in 1 shard" in text and "png 50 %" in text and "no labels" in text
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_it_takes_what_training_takes(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sets"
    for tar in tiny_shards.glob("train-*.tar"):
        (folder / "part").mkdir(parents=True, exist_ok=True)
        shutil.copy(tar, folder / "part")
    pattern, one = f"{folder}/part/train-{{000000..000001}}.tar", f"{folder}/part/train-000003.tar"
    for spec, images, shards, splits in (
        (str(folder), 32, 4, ["train"]),
        (pattern, 16, 2, ["train"]),
        (one, 8, 1, ["train"]),
        (f"{tiny_shards}:0.5,{pattern}:0.5", 48, 6, ["train", "val"]),
    ):
        assert main(["inspect", spec, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["path"] == spec and list(found["splits"]) == splits
        train = found["splits"]["train"]
        assert (train["images"], train["shards"]) == (images, shards)
        assert train["bytes"] == shards * (tiny_shards / "train-000000.tar").stat().st_size
        sheet = tmp_path / f"{images}.png"
        assert main(["inspect", spec, "--sheet", str(sheet)]) == 0
        assert Image.open(sheet).format == "PNG"
        capsys.readouterr()
    for wrong, words in (
        ("https://user:secret@host/set", "there is an address in https://host/set"),
        (f"{folder},s3://bucket/set", f"there is an address in {folder},s3://bucket/set"),
        (f"{folder}/part/train-{{000003..000004}}.tar", "1 are missing"),
        (str(tiny_shards.parent), "nor a data set"),
    ):
        assert main(["inspect", wrong]) == 2
        assert words in capsys.readouterr().err
    assert main(["inspect", str(tiny_shards), "--tensors"]) == 2
    assert "--tensors is for a checkpoint" in capsys.readouterr().err


def test_the_sheet_shows_images_whole_and_bad_ones_as_such(
    tiny_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    shards = IndexedShards.open(folder)
    out = tmp_path / "sheet.png"
    contact_sheet(shards, out)
    sheet = np.asarray(Image.open(out)).astype(int)
    again = tmp_path / "again.png"
    contact_sheet(shards, again)
    assert again.read_bytes() == out.read_bytes()
    rows = np.load(folder / "train-index.npy")
    for row in rows:
        with open(folder / f"train-{row['shard']:06d}.tar", "r+b") as file:
            file.seek(int(row["offset"]))
            file.write(bytes(int(row["size"])))
    bad = tmp_path / "bad.png"
    contact_sheet(IndexedShards.open(folder), bad)
    spoiled = np.asarray(Image.open(bad)).astype(int)
    assert spoiled.shape == sheet.shape

    def colourful(image: np.ndarray) -> float:
        return float((image.max(-1) - image.min(-1) > 20).mean())

    assert colourful(sheet) > 0.2 and colourful(spoiled) == 0


def test_a_sheet_replaces_nothing(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    assert main(["inspect", str(tiny_shards), "--sheet", str(mine)]) == 2
    assert f"{mine} exists" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"
    assert main(["inspect", str(tmp_path), "--sheet", str(tmp_path / "x.png")]) == 2
    nowhere = tmp_path / "nowhere" / "x.png"
    assert main(["inspect", str(tiny_shards), "--sheet", str(nowhere)]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert not nowhere.parent.exists()
