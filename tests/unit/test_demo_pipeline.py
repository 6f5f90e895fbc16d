"""What the demos decide before and between their steps."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from moco_scale.demo import cifar10, pipeline, run
from moco_scale.errors import UserError


def _parse(module: object, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(argv)


def test_a_second_demo_replaces_the_first(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    pipeline.claim(out)
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "old").write_text("old")
    pipeline.claim(out)
    assert [p.name for p in out.iterdir()] == [pipeline.MARKER]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="no demo made"):
        pipeline.claim(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "words"


def test_an_interrupted_run_goes_on_and_no_other_is_touched(tmp_path: Path) -> None:
    out, settings = tmp_path / "runs" / "cifar10", {"train": {"epochs": "200"}}
    assert not pipeline.claim_or_continue(out, settings)
    (out / "current.pth").write_text("a hundred epochs")
    assert pipeline.claim_or_continue(out, settings)
    with pytest.raises(UserError, match="a run with other flags; name another folder"):
        pipeline.claim_or_continue(out, {"train": {"epochs": "100"}})
    (out / pipeline.SUMMARY).write_text("{}")
    with pytest.raises(UserError, match="holds a finished run"):
        pipeline.claim_or_continue(out, settings)
    with pytest.raises(UserError, match="no demo made"):
        pipeline.claim(out)
    assert (out / "current.pth").read_text() == "a hundred epochs"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*file cannot be written"):
        pipeline.claim_or_continue(tmp_path / "file", settings)


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*file"):
        pipeline.claim(tmp_path / "file")


def test_only_flags_that_were_given_reach_train_py() -> None:
    args = _parse(cifar10, "--epochs", "8", "--batch-size", "128", "--base-lr", "0.03")
    given = pipeline.given_flags(args)
    assert given == {"epochs": "8", "batch-size": "128", "base-lr": "0.03"}


def test_the_flags_handed_on_and_the_demo_settings_exist_in_train_py() -> None:
    from moco_scale.command_line import make_parser, parse

    known = make_parser().format_help()
    for name in (*pipeline.TRAIN_FLAGS, *run.SETTINGS):
        assert f"--{name} " in known, name
    words = [word for name, value in run.SETTINGS.items() for word in (f"--{name}", value)]
    parse(words)


@pytest.mark.parametrize(
    ("gpus", "batch", "processes"), [(0, 64, 2), (0, 63, 1), (1, 64, 1), (8, 64, 8), (3, 64, 2)]
)
def test_processes_are_the_gpus_that_divide_the_batch(
    monkeypatch: pytest.MonkeyPatch, gpus: int, batch: int, processes: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pipeline.process_count(batch) == processes


def test_a_failing_step_names_its_command(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(3)"]
    with pytest.raises(UserError, match=r"sharding failed with exit status 3.*sys\.exit\(3\)"):
        pipeline.run_step("Sharding", command, tmp_path, dict(os.environ))


def test_the_kNN_before_training_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"step": 10, "knn_top1_initial": 17.5}) + '\n{"step": 20}\n')
    assert pipeline.initial_knn(log) == 17.5
    log.write_text('{"step": 20}\n')
    with pytest.raises(UserError, match="--knn-freq"):
        pipeline.initial_knn(log)
