"""Bad input to ``train.py``: one clear message and status 2, no traceback, and never a hang."""

import errno
import json
import math
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import TINY, Outcome, forked, launched
from conftest import write_picture
from PIL import Image

from moco_scale import checkpoint
from moco_scale.data.index import IndexedShards
from moco_scale.data.order import BatchPlan, FullPermutation
from moco_scale.data.reader import ViewBatch

pytestmark = pytest.mark.timeout(1800)


def assert_refused(run: Outcome, *words: object) -> None:
    assert run.status == 2, run.output
    assert "Traceback" not in run.output
    assert run.output.count("error: ") == 1, run.output
    for word in words:
        assert str(word) in run.output, run.output


def flags_for(data: Path, out: Path) -> tuple[object, ...]:
    return (*TINY, "--data-dir", data, "--output-dir", out)


# Data


def test_no_such_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    run = forked(*flags_for(missing, tmp_path / "out"))
    assert_refused(run, f"no folder {missing}", "python -m moco_scale shard", f"--out {missing}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_data_dir_imagenet_is_looked_for(tmp_path: Path, ranks: int) -> None:
    run = forked("--device", "cpu", cwd=tmp_path, ranks=ranks)
    command = "python -m moco_scale shard --source PICTURES --out data/imagenet"
    assert_refused(run, "data/imagenet", command)


def test_an_image_folder_where_shards_are_meant(picture_folder: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(picture_folder, tmp_path / "out"))
    command = f"python -m moco_scale shard --source {picture_folder} --out {picture_folder}-shards"
    assert_refused(run, "not a folder of shards", command)


def swap_two_pictures(shards: Path) -> str:
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


@pytest.mark.parametrize("damage", [swap_two_pictures, truncate, remove])
def test_damaged_shards(damage: Callable[[Path], str], tiny_shards: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    message = damage(shards)
    assert_refused(forked(*flags_for(shards, tmp_path / "out")), message, "again")
    assert not (tmp_path / "out").exists()


def damage_picture(shards: Path, split: str, sample: int) -> str:
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
    """Shards whose picture for the second of two processes in the second step is damaged."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    sample = int(BatchPlan(FullPermutation(32, 0), 8).share(1, 1, 2).index[0])
    return shards, damage_picture(shards, "train", sample)


def test_a_damaged_picture_met_in_training(damaged: tuple[Path, str], tmp_path: Path) -> None:
    shards, where = damaged
    run = forked(*flags_for(shards, tmp_path / "out"), "--num-workers", 1)
    assert_refused(run, where, shards, "--verify")
    assert "step 1/8" in run.output


def test_a_damaged_picture_that_one_of_two_processes_meets(
    damaged: tuple[Path, str], tmp_path: Path
) -> None:
    shards, where = damaged
    status, output = launched("torchrun", *flags_for(shards, tmp_path / "out"))
    assert status != 0
    assert output.count("train.py: error: ") == 1, output
    assert f"rank 1 on {os.uname().nodename}: cannot decode the picture" in output
    assert where in output
    assert "--verify" in output
    # torchrun itself ends by raising; the program does not.
    assert not re.search(r"^\[rank\d\]: Traceback|/train\.py\", line", output, re.MULTILINE), output


def test_a_damaged_picture_that_one_process_meets_in_the_knn_evaluation(
    tiny_shards: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    where = damage_picture(shards, "val", 7)
    run = forked(*flags_for(shards, tmp_path / "out"), "--knn-freq", 1, ranks=2)
    assert_refused(run, where, "--verify")


def test_fewer_pictures_than_a_batch(tiny_shards: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(tiny_shards, tmp_path), "--batch-size", 64)
    assert_refused(run, "32 samples do not fill one global batch of 64", "--batch-size")


def test_all_kinds_of_pictures_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "train" / "all"
    for i, name in enumerate(("rgb.jpg", "rgb.png", "rgb.webp")):
        write_picture(folder / name, seed=i)
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
    arguments = ("shard", "--source", tmp_path / "pictures", "--out", shards, "--workers", 1)
    run = forked(*arguments, "--verify", script="-m moco_scale")
    assert run.status == 0, run.output
    assert "train: 8 pictures" in run.output
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
        ('{"zero_optimization": {"stage": 7}}', ["stage 7 is not supported"]),
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


# The output folder


def test_output_below_a_file(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = forked(*flags_for(tiny_shards, tmp_path / "file" / "out"), ranks=2)
    assert_refused(run, "--output-dir", tmp_path / "file" / "out")
    run = forked(*flags_for(tiny_shards, tmp_path / "file"))
    assert_refused(run, "--output-dir", "is a file")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with the options given, for root only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a file system needs root and `mount`")
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this machine does not let root mount a file system")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_output_on_a_read_only_disk(mount: Callable[[str], Path], tiny_shards: Path) -> None:
    out = mount("ro,size=1m") / "out"
    assert_refused(forked(*flags_for(tiny_shards, out)), out, "Read-only file system")


def test_a_full_disk_while_saving(mount: Callable[[str], Path], tiny_shards: Path) -> None:
    """Room for one checkpoint and the model, not for two: resnet18 takes 134 and 90 MB."""
    disk = mount("size=300m")
    out = disk / "out"
    flags = (*flags_for(tiny_shards, out), "--checkpoint-freq", 1, "--max-steps", 2)
    run = forked(*flags, ranks=2)
    assert_refused(run, "No space left on device", out / "checkpoints", "untouched")
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000001", "latest"}
    assert int(checkpoint.load(out / "checkpoints" / "step-00000001")["queue.enqueued"]) == 8
    assert torch.load(out / "current.pth", weights_only=True)["step"] == 1
    subprocess.run(["mount", "-o", "remount,size=700m", str(disk)], check=True)
    run = forked(*flags, ranks=2)
    assert run.status == 0, run.output
    assert "step-00000001 at step 1" in run.output
    assert (out / "checkpoints" / "latest").read_text() == "step-00000002\n"


def fail_to_save(where: str) -> None:
    """Let rank 1 meet an error while the ranks write their first checkpoint."""
    from torch.distributed.checkpoint import FileSystemWriter

    from moco_scale.pretrain import Pretraining

    def disk_error(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def defect(*arguments: Any) -> Any:
        raise ZeroDivisionError("so it goes")

    if os.environ["RANK"] == "1":
        if where == "writing":
            FileSystemWriter.write_data = disk_error  # type: ignore[method-assign,assignment]
        else:
            checkpoint.RowsSavePlanner = defect  # type: ignore[misc,assignment]
    train_step = Pretraining.train_step

    def step(self: Pretraining, batch: ViewBatch) -> None:
        deadline = time.monotonic() + 60
        while batch.step == 2 and not self.folder.save_failed():  # begun after the second step
            assert time.monotonic() < deadline
            time.sleep(0.01)
        train_step(self, batch)

    Pretraining.train_step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["writing", "beginning"])
def test_a_save_that_fails_beside_the_loop_stops_all_ranks_soon(
    tiny_shards: Path, tmp_path: Path, where: str
) -> None:
    """Whatever one rank meets, no other waits for it, nor does the run for its next save."""
    flags = (*flags_for(tiny_shards, tmp_path), "--checkpoint-freq", 2)
    flags = (*flags, "--epochs", 1, "--batch-size", 4, "--bn-group-size", 2)
    run = forked(*flags, ranks=2, prepare=fail_to_save, prepare_args=(where,))
    assert run.status == 2, run.output
    reason = "Input/output error" if where == "writing" else "ZeroDivisionError: so it goes"
    place = "" if where == "writing" else r"rank 1 on \S+: "
    text = rf"{place}cannot write the checkpoint {tmp_path}/checkpoints: {reason}"
    assert re.search(rf"^train.py: error: {text}", run.output, re.MULTILINE), run.output
    assert re.search(rf"saving has failed, so the run is about to stop: {text}", run.output)
    assert ("Traceback" in run.output) == (where == "beginning")  # a defect is shown as one
    assert not list((tmp_path / "checkpoints").glob("*step-*"))
    # Known after step 3, heard by all after step 4, where the next save would have been due.
    assert re.findall(r"step (\d+)/8", run.output) == ["1", "2", "3"], run.output


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def stopped_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after one step."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    run = forked(*flags_for(tiny_shards, out), "--max-steps", 1)
    assert run.status == 0, run.output
    return out


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of it. Files are links: replace them, do not write into them."""
    copy = shutil.copytree(stopped_run, tmp_path / "out", copy_function=os.link)
    for name in ("log.txt", "metrics.jsonl"):
        (copy / name).unlink()
        shutil.copy(stopped_run / name, copy / name)
    return copy


def test_a_write_that_fails_while_saving(stopped: Path, tiny_shards: Path) -> None:
    """Any user can have this one: files may not grow beyond 50 MB."""
    flags = (*flags_for(tiny_shards, stopped), "--max-steps", 2)
    run = forked(*flags, prepare=limit_files, prepare_args=(50 << 20,))
    assert_refused(run, stopped / "checkpoints", "untouched")
    folder = stopped / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"step-00000001", "latest"}
    run = forked(*flags)
    assert run.status == 0, run.output
    assert "at step 1" in run.output
    assert (folder / "latest").read_text() == "step-00000002\n"


def test_a_damaged_checkpoint(stopped: Path, tiny_shards: Path) -> None:
    flags = flags_for(tiny_shards, stopped)
    folder = stopped / "checkpoints" / "step-00000001"
    (tensors,) = folder.glob("*.distcp")
    content = tensors.read_bytes()
    tensors.unlink()
    tensors.write_bytes(content[: len(content) // 2])
    assert_refused(forked(*flags), folder, "is damaged", tensors.name)
    tensors.write_bytes(bytes(len(content)))  # the right length, as after a crash of the machine
    words = ("is damaged", tensors.name, "not what was written", "move", "away to start over")
    assert_refused(forked(*flags), folder, *words)


def test_resuming_from_what_is_no_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    flags = flags_for(tiny_shards, tmp_path / "out")
    missing = tmp_path / "missing"
    assert_refused(forked(*flags, "--resume", missing), missing, "no such folder")
    assert_refused(
        forked(*flags, "--resume", tiny_shards), tiny_shards, "not a complete checkpoint"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_run(stopped: Path, tiny_shards: Path, tmp_path: Path) -> None:
    run = forked(*flags_for(tiny_shards, stopped), "--resume", "none")
    assert_refused(run, "--resume none", stopped, "already holds a run")
    other = tmp_path / "other"
    flags = flags_for(tiny_shards, other)
    other.mkdir()
    (other / "current.pth").write_bytes(b"a model of somebody's")
    run = forked(*flags)
    assert_refused(run, other, "holds a model but no checkpoint")
    assert (other / "current.pth").read_bytes() == b"a model of somebody's"


# Numbers that go wrong


def spoil(where: str, first: int, last: int, rank: int) -> None:
    """Let one rank's loss, or what its backward pass starts from, be no number in some steps."""
    from moco_scale import pretrain
    from moco_scale.engines.ddp import DDPEngine
    from moco_scale.queue import KeyQueue

    now = {"step": 0}
    train_step, contrast = pretrain.Pretraining.train_step, KeyQueue.contrast
    backward = DDPEngine._backward

    def bad() -> bool:
        return first <= now["step"] <= last and int(os.environ.get("RANK", "0")) == rank

    def counted(self: pretrain.Pretraining, batch: ViewBatch) -> None:
        now["step"] = batch.step + 1
        train_step(self, batch)

    def lossy(*arguments: Any) -> Any:
        result = contrast(*arguments)
        return result._replace(loss=result.loss * math.nan) if bad() else result

    def steep(self: DDPEngine, loss: torch.Tensor) -> None:
        backward(self, loss * math.inf if bad() else loss)

    pretrain.Pretraining.train_step = counted  # type: ignore[method-assign]
    if where == "loss":
        KeyQueue.contrast = lossy  # type: ignore[method-assign,assignment]
    else:
        DDPEngine._backward = steep  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("where", "said"), [("loss", "its loss"), ("gradient", "the weights after it")]
)
def test_numbers_that_go_wrong_are_named_and_end_the_run(
    tiny_shards: Path, tmp_path: Path, where: str, said: str
) -> None:
    flags = (*flags_for(tiny_shards, tmp_path), "--max-nonfinite", 2, "--no-async-save")
    run = forked(*flags, ranks=2, prepare=spoil, prepare_args=(where, 5, 99, 1))
    good = tmp_path / "checkpoints" / "step-00000004"
    words = ("stopped at step 8: not finite in 2 steps in a row (on rank 1: its loss)", "--base-lr")
    assert_refused(run, *words, f"last good checkpoint: {good}")
    first = rf"rank 1 on \S+: step 5 is not finite: {said}; last good checkpoint: {good}\n"
    assert re.search(first, run.output), run.output
    assert run.output.count(" is not finite: ") == 2
    assert [c.name for c in (tmp_path / "checkpoints").glob("step-*")] == [good.name]


def test_what_is_not_finite_is_not_saved(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*flags_for(tiny_shards, tmp_path), "--checkpoint-freq", 3)
    run = forked(*flags, prepare=spoil, prepare_args=("gradient", 4, 4, 0))
    words = "stopped at step 4: not finite: the weights after it"
    assert_refused(run, words, tmp_path / "checkpoints" / "step-00000003")
    assert [c.name for c in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.slow
def test_an_overflow_of_fp16_is_no_such_step(tiny_shards: Path, tmp_path: Path) -> None:
    """fp16 leaves out a step for any gradient that is not finite; a loss that is none counts."""
    flags = (*flags_for(tiny_shards, tmp_path), "--precision", "fp16")
    run = forked(*flags, prepare=spoil, prepare_args=("loss", 3, 4, 0))
    assert run.status == 0, run.output
    assert run.output.count("is not finite") == 1
    run = forked(*flags, "--output-dir", tmp_path / "other", "--max-nonfinite", 2,
                 prepare=spoil, prepare_args=("loss", 3, 4, 0))  # fmt: skip
    assert_refused(run, "not finite in 2 steps in a row (on rank 0: its loss)")
    run = forked(*flags, "--output-dir", tmp_path / "third", "--max-nonfinite", 1,
                 prepare=spoil, prepare_args=("gradient", 3, 4, 0))  # fmt: skip
    assert run.status == 0, run.output
    assert "is not finite" not in run.output
