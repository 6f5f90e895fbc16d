"""Other ways of computing the same run, and other encoders, through the commands of users."""

import json
from pathlib import Path

import pytest
from commands import TINY, forked

pytestmark = pytest.mark.timeout(1800)

# Small steps on enough pixels: rounding stays small.
GENTLE = (*TINY, "--base-lr", 0.001, "--image-size", 48, "--symmetric", "--max-steps", 5)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_parts_and_recomputation_give_the_same_curve(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*GENTLE, "--data-dir", tiny_shards)
    status, output = forked(*flags, "--output-dir", tmp_path / "whole")
    assert status == 0, output
    ways = ("--accumulation-steps", 2, "--activation-checkpointing")
    status, output = forked(*flags, *ways, "--output-dir", tmp_path / "parts")
    assert status == 0, output
    assert "2 micro-batches per step; activation checkpointing" in output
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.slow
def test_a_file_s_clipping_is_done_and_said(tiny_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"gradient_clipping": 0.01, "zero_optimization": {"stage": 1}}))
    flags = (*GENTLE, "--data-dir", tiny_shards)
    status, output = forked(*flags, "--deepspeed", file, "--output-dir", tmp_path / "file")
    assert status == 0, output
    assert "gradients are clipped at norm 0.01" in output
    status, output = forked(*flags, "--clip-grad", 0.01, "--output-dir", tmp_path / "flag")
    assert status == 0, output
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "flag"), rel=1e-3)


def test_groups_that_a_part_cannot_hold_are_named(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, "--accumulation-steps", 4)
    assert status == 2
    assert "a part has 2 of the 8 images" in output
    assert "groups of 4 (--bn-group-size)" in output
    status, output = forked(*flags, "--accumulation-steps", 3)
    assert status == 2
    assert "--accumulation-steps 3 does not divide the 8 images" in output
    assert "these do: 1, 2, 4, 8" in output


def test_a_transformer_is_trained_and_evaluated(tiny_shards: Path, tmp_path: Path) -> None:
    vit = ("--model", "vit_small", "--patch-size", 8, "--dim", 16)
    flags = (*TINY, *vit, "--data-dir", tiny_shards, "--max-steps", 2, "--epochs", 1)
    flags = (*flags, "--batch-size", 12, "--bn-group-size", 4)  # which no process's 6 would hold
    status, output = forked(*flags, "--engine", "fsdp", "--output-dir", tmp_path, ranks=2)
    assert status == 0, output
    status, output = forked(
        *("--data-dir", tiny_shards, "--pretrained-model", tmp_path / "current.pth"),
        *("--output-dir", tmp_path / "eval", "--protocol", "knn", "--device", "cpu"),
        *("--num-workers", 0),
        script="eval.py",
    )
    assert status == 0, output
    assert 0 <= json.loads((tmp_path / "eval" / "results.json").read_text())["top1"] <= 100


@pytest.mark.slow
def test_images_that_are_kept_decoded_give_the_same_run(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--max-steps", 6)
    status, output = forked(*flags, "--output-dir", tmp_path / "plain", ranks=2)
    assert status == 0, output
    cached = ("--cache", tmp_path / "kept", "--num-workers", 1)
    for out in ("first", "second"):  # the second decodes nothing
        status, output = forked(*flags, *cached, "--output-dir", tmp_path / out, ranks=2)
        assert status == 0, output
        assert losses(tmp_path / out) == losses(tmp_path / "plain")
    (folder,) = (tmp_path / "kept").iterdir()
    assert json.loads((folder / "meta.json").read_text())["complete"]


def test_decoding_on_a_gpu_wants_one(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    status, output = forked(*flags, "--decode", "gpu")
    assert status == 2
    assert "--decode gpu needs a GPU" in output
