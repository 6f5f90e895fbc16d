"""What the demos decide before and between their steps."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_scale.__main__ import main
from moco_scale.commands import cifar10, demo
from moco_scale.data.shards.protocols import Shards
from moco_scale.demo import output_folder, pipeline
from moco_scale.evaluation.knn import Splits
from moco_scale.utils.errors import UserError


def test_a_second_demo_replaces_the_first(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    output_folder.claim(out)
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "old").write_text("old")
    output_folder.claim(out)
    assert [p.name for p in out.iterdir()] == [output_folder.MARKER]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="no demo made"):
        output_folder.claim(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "words"


IMAGES: dict[str, Any] = {"source": None, "train_per_class": None}
SOURCE = IMAGES | {"source": "/data/cifar"}


def test_an_interrupted_run_goes_on_and_no_other_is_touched(tmp_path: Path) -> None:
    out, train = tmp_path / "runs" / "cifar10", {"epochs": 200}
    assert not output_folder.claim_or_continue(out, IMAGES, train)
    (out / "current.pth").write_text("a hundred epochs")
    assert output_folder.claim_or_continue(out, IMAGES, train)
    with pytest.raises(UserError, match="other settings") as refused:
        output_folder.claim_or_continue(out, SOURCE, {"epochs": 100})
    for words in ("--epochs: 200 in the run, 100 now", "'/data/cifar' now", "OUT=FOLDER"):
        assert words in str(refused.value)
    (out / output_folder.SUMMARY).write_text("{}")
    with pytest.raises(UserError, match="holds a finished run"):
        output_folder.claim_or_continue(out, IMAGES, train)
    with pytest.raises(UserError, match="no demo made"):
        output_folder.claim(out)
    assert (out / "current.pth").read_text() == "a hundred epochs"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*file cannot be written"):
        output_folder.claim_or_continue(tmp_path / "file", IMAGES, train)


@pytest.mark.parametrize("content", ["words", "[1]", '{"train": {}}', output_folder.REPLACEABLE])
def test_a_folder_with_another_marker_is_somebody_elses(tmp_path: Path, content: str) -> None:
    (tmp_path / output_folder.MARKER).write_text(content)
    with pytest.raises(UserError, match="something else"):
        output_folder.claim_or_continue(tmp_path, IMAGES, {})


def test_before_anything_is_trained_other_settings_may_follow(tmp_path: Path) -> None:
    def marked(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "content").write_text("")
        return tmp_path / name / "content"

    assert not output_folder.claim_or_continue(tmp_path, IMAGES, {"epochs": 200})
    shards, checkpoints = marked("shards"), tmp_path / "checkpoints"
    checkpoints.mkdir()  # of a run that ended before its first checkpoint
    assert output_folder.claim_or_continue(tmp_path, IMAGES, {"epochs": 8})
    assert shards.exists(), "made from the same source"
    assert output_folder.claim_or_continue(tmp_path, SOURCE, {"epochs": 8})
    assert not shards.exists(), "made from another source"
    (checkpoints / "step-00000010").mkdir()
    with pytest.raises(UserError, match="--epochs: 8 in the run, 9 now"):
        output_folder.claim_or_continue(tmp_path, SOURCE, {"epochs": 9})


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir .*file"):
        output_folder.claim(tmp_path / "file")


def _passthrough(*words: str) -> pipeline.Training:
    return pipeline.training("demo", demo.SETTINGS, words)


def test_every_flag_of_training_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    made = _passthrough(
        "--symmetric", "--engine", "fsdp", "--compile", "--lr-decay-epochs", "3", "5"
    )
    config = made.config
    assert config.contrast.symmetric and config.run.compile and config.run.engine == "fsdp"
    assert config.optim.lr_decay_epochs == (3, 5)
    assert "--deepspeed" not in made.words, "contradicts --engine"
    assert _passthrough().words[:2] == ("--deepspeed", "zero1")
    assert _passthrough("--epochs", "9").config.optim.epochs == 9, "goes before the demo's own"
    for flag in ("--preflight", "--data-dir=x"):
        with pytest.raises(UserError, match="not passed on"):
            _passthrough(flag)
    for words in (("--batch-size", "abc"), ("--image-size", "x"), ("--symetric",)):
        with pytest.raises(SystemExit):
            _passthrough(*words)
        assert words[0] in capsys.readouterr().err


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of a demo's steps; of these only sharding is carried out."""
    lines: list[list[str]] = []

    def record(name: str, command: list[str], environment: dict[str, str]) -> None:
        lines.append(command)
        if name == "Sharding":
            assert main(command[command.index("shard") :]) == 0
        elif name == "Pretraining":
            out = Path(command[command.index("--output-dir") + 1])
            (out / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
        else:
            out = Path(command[command.index("--output-dir") + 1])
            out.mkdir()
            (out / "results.json").write_text('{"top1": 50.0}')

    monkeypatch.setattr(pipeline, "run_step", record)
    monkeypatch.setattr(pipeline, "_launcher", lambda processes: ["deepspeed"])
    return lines


def test_a_run_without_its_own_kNN_on_few_images_has_a_table(
    image_folder: Path,
    tmp_path: Path,
    steps: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """24 images for 3 processes, and no kNN before training."""
    out = tmp_path / "out"
    argv = ["cifar10", "--source", str(image_folder), "--output-dir", str(out), "--symmetric"]
    argv += ["--num-processes", "3", "--batch-size", "12", "--knn-freq", "0", "--device", "cpu"]
    assert main(argv) == 0
    summary = json.loads((out / output_folder.SUMMARY).read_text())
    assert summary["knn_initial"] is None and summary["linear"] == 50.0
    assert "as initialised" in (printed := capsys.readouterr().out) and "  n/a\n" in printed
    _, train, *evaluations = steps
    assert "--symmetric" in train and train[-2:] == ["--output-dir", str(out)]
    for line in evaluations:
        assert line[line.index("--batch-size") + 1] == "24"
        assert line[line.index("--device") + 1] == "cpu"


def test_after_a_first_try_that_found_nothing_a_source_can_be_named(
    image_folder: Path, tmp_path: Path, steps: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = ["cifar10", "--output-dir", str(out), "--batch-size", "12", "--device", "cpu"]

    def no_network(*_: Any) -> Path:
        raise UserError("could not be downloaded")

    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "prepare", no_network)
        assert main(argv) == 2
    assert main([*argv, "--epochs", "8", "--source", str(image_folder)]) == 0
    assert (out / output_folder.SUMMARY).exists() and "8" in steps[1]


def test_images_without_labels_are_refused_before_hours_of_training(
    image_folder: Path,
    tmp_path: Path,
    steps: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def val(splits: Splits) -> Shards | None:
        return splits.val

    monkeypatch.setattr(pipeline, "unlabelled_split", val)
    argv = ["cifar10", "--source", str(image_folder), "--output-dir", str(tmp_path / "out")]
    assert main([*argv, "--batch-size", "12"]) == 2
    assert "the val images have no labels" in capsys.readouterr().err
    assert len(steps) == 1, "more than sharding"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-processes", "3"), "does not divide --batch-size 64"),
        (("--train-per-class", "3"), "30 images of 10 classes do not fill one batch of 64"),
        (("--epochs", "0"), "--epochs 0"),
        (("--nce-t", "abc"), "--nce-t"),
        (("--train-per-class", "0"), "0 is not positive"),
        (("--val-per-class", "-3"), "-3 is not positive"),
        (("--num-processes", "-1"), "-1 is not positive"),
        (("--seed", "-1"), "-1 is negative"),
    ],
)
def test_nothing_is_deleted_before_all_flags_are_known_to_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    output_folder.claim(tmp_path)
    (tmp_path / "earlier.pth").write_text("")
    with contextlib.suppress(SystemExit):
        assert main(["demo", "--output-dir", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "earlier.pth").exists()


def test_a_wrong_source_or_flag_leaves_no_folder_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for words in (["--source", str(tmp_path / "none")], ["--bn-group-size", "7"]):
        assert main(["cifar10", "--output-dir", str(out), *words]) == 2
        assert words[0] in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("images", "processes", "batch"), [(50_000, 8, 256), (100, 2, 100), (500, 3, 255), (7, 2, 6)]
)
def test_the_evaluation_has_a_batch_that_fits(images: int, processes: int, batch: int) -> None:
    assert pipeline.evaluation_batch(images, processes) == batch


@pytest.mark.parametrize(
    ("gpus", "batch", "processes"), [(0, 64, 2), (0, 63, 1), (1, 64, 1), (8, 64, 8), (3, 64, 2)]
)
def test_processes_are_the_gpus_that_divide_the_batch(
    monkeypatch: pytest.MonkeyPatch, gpus: int, batch: int, processes: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pipeline.process_count(None, batch) == processes


def test_a_failing_step_names_its_command() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(3)"]
    with pytest.raises(UserError, match=r"sharding failed with exit status 3.*sys\.exit\(3\)"):
        pipeline.run_step("Sharding", command, dict(os.environ))


def test_the_kNN_before_training_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"step": 10, "knn_top1_initial": 17.5}) + '\n{"step": 20}\n')
    assert pipeline.initial_knn(log) == 17.5
    log.write_text('{"step": 20}\n')
    assert pipeline.initial_knn(log) is None
