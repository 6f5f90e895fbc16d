"""Training as users start it: what a run writes and says, under each way of starting it."""

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import tarfile
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import LIMIT, TINY, command, forked, kill_tree, make_shards
from conftest import REPOSITORY, write_image
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_scale.checkpoints import checkpoint

pytestmark = pytest.mark.timeout(1800)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def plain(value: Any) -> bool:
    """Whether a value is made of what JSON knows only."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def test_every_step_is_recorded(zero1_run: tuple[Path, str]) -> None:
    records = metrics(zero1_run[0])
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["epoch"] for r in records] == [0, 0, 0, 1, 1, 1, 1, 2]
    wanted = ["step", "epoch", "loss", "lr", "momentum", "images_per_second", "data_wait_fraction"]
    for record in records:
        assert set(wanted) <= record.keys()
        assert math.isfinite(record["loss"])
        assert record["images_per_second"] > 0
        assert 0 <= record["data_wait_fraction"] <= 1
        assert record["chance_loss"] == pytest.approx(math.log(33))
        steps = min(record["step"], 4)  # of 8 keys, in a queue of 32
        assert record["queue_age_max"] == steps
        assert record["queue_age_mean"] == (1 + steps) / 2
    assert [r["step"] for r in records if "knn_top1" in r] == [4, 8]
    assert all(0 <= r["knn_top1"] <= 100 for r in records if "knn_top1" in r)
    assert 0 <= records[0]["knn_top1_initial"] <= 100


def test_the_log_is_plain_lines(zero1_run: tuple[Path, str]) -> None:
    out, output = zero1_run
    assert "\r" not in output
    assert "Traceback" not in output
    # The launcher warns about hosts and GPUs that it does not find; the program about nothing.
    assert not re.search(r"\w+Warning\b", output), output
    log = (out / "log.txt").read_text()
    for step in range(1, 9):
        for text in (output, log):
            line = rf"step {step}/8 loss \d+\.\d+ \(chance 3\.50\) lr .*images/s.*waiting.*ETA"
            assert len(re.findall(line, text)) == 1  # from one of the two processes
    assert "2 process(es) on cpu, engine deepspeed, fp32; global batch 8, 4 a process" in log


def test_the_configuration_is_written(zero1_run: tuple[Path, str], tiny_shards: Path) -> None:
    written = json.loads((zero1_run[0] / "config.json").read_text())
    assert (written["nce_k"], written["batch_size"], written["engine"]) == (32, 8, "deepspeed")
    assert written["data_dir"] == str(tiny_shards)
    assert len(written["data_fingerprint"]) == 32


def test_tensorboard_has_curves_flags_and_pairs(zero1_run: tuple[Path, str]) -> None:
    out = zero1_run[0]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in metrics(out)
    ]
    assert {"lr", "images_per_second", "knn_top1"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["augmented pairs"]
    (name,) = (tag for tag in events.Tags()["tensors"] if "hyper-parameters" in tag)
    assert b"| nce_k | 32 |" in events.Tensors(name)[0].tensor_proto.string_val[0]


def test_checkpoints_are_complete_and_the_last_few_are_kept(zero1_run: tuple[Path, str]) -> None:
    root = zero1_run[0] / "checkpoints"
    # Every epoch's is kept for good, and two of the others; nothing half-written remains.
    assert sorted(p.name for p in root.iterdir()) == [
        *("latest", "step-00000003", "step-00000004", "step-00000006", "step-00000008")
    ]
    assert (root / "latest").read_text().strip() == "step-00000008"
    meta = checkpoint.read_meta(root / "step-00000008")
    assert (meta["step"], meta["epoch"], meta["samples"], meta["processes"]) == (8, 2, 64, 2)
    tensors = checkpoint.load(root / "step-00000008")
    assert int(tensors["queue.pointer"]) == 64 % 32
    assert tensors["queue.keys"].shape == (32, 128)
    momenta = [n for n in tensors if n.startswith("optimizer.")]
    trained = [n for n in tensors if n.startswith("model.query.")]
    assert len(momenta) == len([n for n in trained if n.endswith((".weight", ".bias"))])
    assert all(tensors[n].dtype == torch.float32 and tensors[n].any() for n in momenta)


def test_the_model_loads_without_running_code(zero1_run: tuple[Path, str]) -> None:
    saved = torch.load(zero1_run[0] / "current.pth", weights_only=True)
    assert plain(saved["opt"])
    assert (saved["opt"]["model"], saved["opt"]["nce_t"], saved["step"]) == ("resnet18", 0.07, 8)
    assert saved["model"].keys() == saved["model_ema"].keys()
    assert not torch.equal(saved["model"]["head.weight"], saved["model_ema"]["head.weight"])
    assert all(t.dtype in (torch.float32, torch.int64) for t in saved["model"].values())


def test_the_figures_are_drawn(zero1_run: tuple[Path, str]) -> None:
    for name in ("report.png", "neighbours.png"):
        with Image.open(zero1_run[0] / name) as image:
            image.load()
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20


def test_symmetric_loss_is_the_same_on_one_and_two_processes(
    tiny_shards: Path, tmp_path: Path
) -> None:
    runs = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        flags = ("--symmetric", "--max-steps", 2, "--data-dir", tiny_shards, "--output-dir", out)
        status, output = forked(*TINY, *flags, ranks=ranks)
        assert status == 0, output
        runs.append(metrics(out))
    for one, two in zip(*runs, strict=True):
        assert one["chance_loss"] == pytest.approx(2 * math.log(33))
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    # Both views' keys are enqueued.
    assert [r["queue_filled"] for r in runs[0]] == [0.5, 1.0]


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("ddp", marks=pytest.mark.slow)])
def test_bf16_computes_in_half_and_keeps_weights_in_fp32(
    tiny_shards: Path, tmp_path: Path, engine: str
) -> None:
    flags = ["--precision", "bf16", "--max-steps", "2", "--image-size", "8", "--batch-size", "4"]
    # Of strided convolutions of single pixels in bf16, oneDNN now and then gives gradients of what
    # was in memory before; with this stem there are none.
    flags += ["--stem", "cifar"]
    if engine == "deepspeed":
        flags += ["--deepspeed", "ds_configs/zero1.json"]
    status, output = forked(*TINY, *flags, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    assert status == 0, output
    assert f"engine {engine}, bf16" in output
    assert [r["step"] for r in metrics(tmp_path)] == [1, 2]
    saved = torch.load(tmp_path / "current.pth", weights_only=True)
    for name in ("model", "model_ema"):
        floats = [t for t in saved[name].values() if t.is_floating_point()]
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in floats)
        # fp32 storage means little if the values are rounded to bf16 on the way.
        weight = saved[name]["backbone.conv1.weight"]
        assert not torch.equal(weight, weight.bfloat16().float())


def test_unlabelled_images_train(tmp_path: Path) -> None:
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.jpg", seed=i)
    shards = make_shards(tmp_path / "images", tmp_path / "shards")
    flags = ("--knn-freq", 1, "--epochs", 1, "--data-dir", shards, "--output-dir", tmp_path / "out")
    status, output = forked(*TINY, *flags)
    assert status == 0, output
    assert "not all train images have labels" in output
    (record,) = metrics(tmp_path / "out")
    assert "knn_top1" not in record
    assert (tmp_path / "out" / "neighbours.png").is_file()


def test_val_tars_without_labels_end_no_run(tmp_path: Path) -> None:
    """Tars of another program: train with labels, val without; the run is cut short, too."""
    for split, labels in (("train", True), ("val", False)):
        with tarfile.open(tmp_path / f"{split}-000000.tar", "w") as tar:
            for i in range(8):
                image = tmp_path / "one.jpg"
                write_image(image, seed=i)
                tar.add(image, f"{i:03d}.jpg")
                if labels:
                    (tmp_path / "one.cls").write_text(str(i % 2))
                    tar.add(tmp_path / "one.cls", f"{i:03d}.cls")
    out = tmp_path / "out"
    flags = ("--knn-freq", 1, "--max-steps", 1, "--data-dir", tmp_path, "--output-dir", out)
    status, output = forked(*TINY, *flags)
    assert status == 0, output
    assert "not all val images have labels" in output
    assert (
        "stopped after step 1 of 2 (--max-steps); the same command without it continues" in output
    )
    assert "done:" not in output
    assert (out / "neighbours.png").is_file()
    _, again = forked(*TINY, *flags)
    assert "nothing left to do: step 1 of 1 (--max-steps) is done" in again


def test_a_terminal_gets_a_progress_bar(tiny_shards: Path, tmp_path: Path) -> None:
    flags = ("--max-steps", 2, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        command("python", *TINY, *flags),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        with contextlib.suppress(OSError):  # how Linux reports the end of a terminal
            while part := os.read(ours, 1 << 16):
                shown += part
        assert process.wait(timeout=LIMIT) == 0, shown.decode()
    finally:
        kill_tree(process.pid)
        os.close(ours)
    text = shown.decode()
    assert re.search(r"\r[^\n]*\d+%\|[^\n]*\| [012]/8 ", text), text
    assert re.search(r"step 2/8 loss \d", text), text
    assert "\r" not in (tmp_path / "log.txt").read_text()


def test_chance_is_that_of_the_keys_that_count(tiny_shards: Path, tmp_path: Path) -> None:
    flags = ("--mask-unfilled", "--max-steps", 3, "--data-dir", tiny_shards)
    status, output = forked(*TINY, *flags, "--output-dir", tmp_path)
    assert status == 0, output
    records = metrics(tmp_path)
    assert [r["chance_loss"] for r in records] == pytest.approx([math.log(n) for n in (1, 9, 17)])
    assert records[0]["loss"] == 0  # no negatives yet
    assert all(r["loss"] > 0 for r in records[1:])
