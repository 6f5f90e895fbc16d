"""Bad input to ``train.py``: one clear message and status 2, no traceback, and never a hang."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import assert_refused, flags_for, forked, launched
from conftest import write_image
from PIL import Image

from moco_scale.data.sampling.order import BatchPlan, FullPermutation
from moco_scale.data.shards.indexed_shards import IndexedShards

pytestmark = pytest.mark.timeout(1800)


# Data


def test_no_such_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    run = forked(*flags_for(missing, tmp_path / "out"))
    assert_refused(run, f"no folder {missing}", "python -m moco_scale shard", f"--out {missing}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_data_dir_imagenet_is_looked_for(tmp_path: Path, ranks: int) -> None:
    run = forked("--device", "cpu", cwd=tmp_path, ranks=ranks)
    command = "python -m moco_scale shard --source IMAGES --out data/imagenet"
    assert_refused(run, "data/imagenet", command)


def test_an_image_folder_where_shards_are_meant(image_folder: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(image_folder, tmp_path / "out"))
    command = f"python -m moco_scale shard --source {image_folder} --out {image_folder}-shards"
    assert_refused(run, "not a folder of shards", command)


def swap_two_images(shards: Path) -> str:
    rows = np.load(shards / "train-index.npy")
    rows[[0, 1]] = rows[[1, 0]]
    np.save(shards / "train-index.npy", rows)
    return "train-index.npy"


def truncate(shards: Path) -> str:
    os.truncate(shards / "train-000002.tar", 5000)
    return "train-000002.tar is truncated"


def remove(shards: Path) -> str:
    (shards / "train-000001.tar").unlink()
    return "train-000001.tar is missing"


@pytest.mark.parametrize("damage", [swap_two_images, truncate, remove])
def test_damaged_shards(damage: Callable[[Path], str], tiny_shards: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    message = damage(shards)
    assert_refused(forked(*flags_for(shards, tmp_path / "out")), message, "again")
    assert not (tmp_path / "out").exists()


def damage_image(shards: Path, split: str, sample: int) -> str:
    """Overwrite half of a JPEG with zeros, which many decoders accept; returns where it is."""
    index = IndexedShards.open(shards, split)
    row = np.load(shards / f"{split}-index.npy")[sample]
    name = f"{split}-{row['shard']:06d}.tar"
    with open(shards / name, "r+b") as file:
        file.seek(int(row["offset"]) + int(row["size"]) // 2)
        file.write(bytes(int(row["size"]) // 2))
    where = index.where(sample)
    assert name in where
    assert "key" in where
    return where


@pytest.fixture
def damaged(tiny_shards: Path, tmp_path: Path) -> tuple[Path, str]:
    """Shards whose image for the second of two processes in the second step is damaged."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    sample = int(BatchPlan(FullPermutation(32, 0), 8).share(1, 1, 2).index[0])
    return shards, damage_image(shards, "train", sample)


def test_a_damaged_image_met_in_training(damaged: tuple[Path, str], tmp_path: Path) -> None:
    shards, where = damaged
    run = forked(*flags_for(shards, tmp_path / "out"), "--num-workers", 1)
    assert_refused(run, where, shards, "--verify")
    assert "step 1/8" in run.output


def test_a_damaged_image_that_one_of_two_processes_meets(
    damaged: tuple[Path, str], tmp_path: Path
) -> None:
    shards, where = damaged
    status, output = launched("torchrun", *flags_for(shards, tmp_path / "out"))
    assert status != 0
    assert output.count("train.py: error: ") == 1, output
    assert f"rank 1 on {os.uname().nodename}: cannot decode the image" in output
    assert where in output
    assert "--verify" in output
    # torchrun itself ends by raising; the program does not.
    assert not re.search(r"^\[rank\d\]: Traceback|/train\.py\", line", output, re.MULTILINE), output


def test_a_damaged_image_that_one_process_meets_in_the_knn_evaluation(
    tiny_shards: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    where = damage_image(shards, "val", 7)
    run = forked(*flags_for(shards, tmp_path / "out"), "--knn-freq", 1, ranks=2)
    assert_refused(run, where, "--verify")


def test_fewer_images_than_a_batch(tiny_shards: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(tiny_shards, tmp_path), "--batch-size", 64)
    assert_refused(run, "32 samples do not fill one global batch of 64", "--batch-size")


def test_all_kinds_of_images_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "train" / "all"
    for i, name in enumerate(("rgb.jpg", "rgb.png", "rgb.webp")):
        write_image(folder / name, seed=i)
    colours = Image.open(folder / "rgb.png").copy()
    colours.convert("L").save(folder / "gray.jpg")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    colours.quantize(16).save(folder / "palette.png")
    deep = np.asarray(colours.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    transparent = colours.convert("RGBA")
    transparent.putalpha(100)
    transparent.save(folder / "transparent.png")
    modes = {path.name: Image.open(path).mode for path in folder.iterdir()}
    assert modes["cmyk.jpg"] == "CMYK"
    assert modes["gray.jpg"] == "L"
    assert modes["palette.png"] == "P"
    assert modes["deep.png"].startswith("I")
    shards, out = tmp_path / "shards", tmp_path / "out"
    arguments = ("shard", "--source", tmp_path / "images", "--out", shards, "--workers", 1)
    run = forked(*arguments, "--verify", script="-m moco_scale")
    assert run.status == 0, run.output
    assert "train: 8 images" in run.output
    run = forked(*flags_for(shards, out), "--epochs", 1)  # one batch: all of them
    assert run.status == 0, run.output
    assert np.isfinite(json.loads((out / "metrics.jsonl").read_text())["loss"])


# Flags and files


def test_a_batch_that_the_processes_cannot_share(tiny_shards: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(tiny_shards, tmp_path), "--bn-group-size", 2, ranks=3)
    assert_refused(run, "global batch of 8", "3 processes", "--batch-size")


def test_a_group_that_does_not_tile_the_batch(tiny_shards: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(tiny_shards, tmp_path), "--bn-group-size", 3)
    assert_refused(run, "--bn-group-size 3", "--batch-size 8")


def test_a_group_that_crosses_the_border_between_processes(
    tiny_shards: Path, tmp_path: Path
) -> None:
    flags = ("--batch-size", 12, "--bn-group-size", 4)
    run = forked(*flags_for(tiny_shards, tmp_path), *flags, ranks=2)
    assert_refused(run, "--bn-group-size", "4", "6")


def test_an_unknown_recipe(tmp_path: Path) -> None:
    run = forked("--recipe", "v9", "--output-dir", tmp_path / "out")
    assert_refused(run, "--recipe", "'v9'", "v1-b1024", "cifar10")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"train_batch_size": 64}', ["train_batch_size 64", "--batch-size 8"]),
        ('{"bf16": {"enabled": true}}', ["bf16 is enabled", "--precision is fp32"]),
        ('{"optimizer": {"type": "Adam"}}', ["'optimizer'", "--base-lr"]),
        (
            '{"zero_optimization": {"stage": 7}}',
            ["zero_optimization.stage 7: must be one of 0, 1, 2, 3"],
        ),
        ('{"train_batch_size": ', ["not valid JSON"]),
        (None, ["No such file"]),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used(
    content: str | None, words: list[str], tiny_shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    flags = (*flags_for(tiny_shards, tmp_path / "out"), "--precision", "fp32")
    assert_refused(forked(*flags, "--deepspeed", path), path, *words)
