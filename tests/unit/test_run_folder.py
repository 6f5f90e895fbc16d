"""The output folder: what a run starts from, what it keeps, and what it refuses."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import folder, refusal, save, steps

from moco_scale.checkpoints import checkpoint
from moco_scale.utils.errors import UserError


def test_a_new_folder_starts_from_the_beginning_and_says_what_runs(tmp_path: Path) -> None:
    run = folder(tmp_path / "a" / "b", nce_t=0.3)
    assert run.prepare() is None
    assert not (tmp_path / "a" / "b" / "config.json").exists()  # the set-up may yet fail
    run.begin(0)
    content = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert content["nce_t"] == 0.3
    assert content["recipe"] == "cifar10"
    assert content["data_fingerprint"] == "f"
    assert folder(tmp_path / "c", resume="none").prepare() is None


def test_the_last_few_checkpoints_are_kept_and_some_for_good(tmp_path: Path) -> None:
    run = folder(tmp_path, keep_checkpoints=2)
    run.prepare()
    save(run, 1, 2, 3, 4, 5, 6, keep=(2, 4))
    assert steps(run) == [2, 4, 5, 6]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", *(f"step-{s:08d}" for s in (2, 4, 5, 6))]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000006\n"
    current = torch.load(tmp_path / "current.pth", weights_only=True)
    assert current.keys() == {"opt", "epoch", "step", "model"}
    assert (current["step"], current["model"]) == (6, {"y.z": 6.0})
    for c, step in zip(run.checkpoints(), (2, 4, 5, 6), strict=True):
        assert checkpoint.load(c)["x"].item() == step


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    run = folder(tmp_path, keep_checkpoints=3)
    run.prepare()
    save(run, 99_999_999, 100_000_000, 100_000_001)
    assert steps(run) == [99_999_999, 100_000_000, 100_000_001]


def test_what_a_kill_left_of_a_deletion_goes_with_the_next(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    half_deleted = tmp_path / "checkpoints" / ".step-00000001.old"
    half_deleted.mkdir(parents=True)
    assert steps(run) == []
    save(run, 2)
    assert not half_deleted.exists()


def test_a_damaged_old_checkpoint_does_not_stop_the_run(tmp_path: Path) -> None:
    run = folder(tmp_path, keep_checkpoints=1)
    run.prepare()
    save(run, 1)
    (run.checkpoints()[0] / "__0_0.distcp").unlink()
    save(run, 2, 3)
    assert steps(run) == [1, 3]


def test_a_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    save(run, 1)
    with pytest.raises(UserError, match="earlier checkpoints are untouched"):
        save(run, 1)
    assert checkpoint.load(run.checkpoints()[0])["x"].item() == 1


def test_auto_resumes_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    save(run, 1, 2)
    partial = tmp_path / "checkpoints" / "step-00000003"
    partial.mkdir()
    (tmp_path / "checkpoints" / ".step-00000004.tmp").mkdir()
    assert folder(tmp_path).prepare() == tmp_path / "checkpoints" / "step-00000002"
    # The pointer is for people and scripts; losing it loses nothing.
    (tmp_path / "checkpoints" / "latest").unlink()
    assert folder(tmp_path, resume="auto").prepare() == run.checkpoints()[-1]


def test_a_damaged_newest_checkpoint_is_said_not_skipped(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    save(run, 1, 2)
    os.truncate(run.checkpoints()[-1] / "__0_0.distcp", 5)
    assert "step-00000002 is damaged" in refusal(folder(tmp_path))


def test_none_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    save(run, 1)
    message = refusal(folder(tmp_path, resume="none"))
    assert "--resume none" in message
    assert "drop the flag to continue it, choose another --output-dir" in message
    assert steps(run) == [1]


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_model_without_checkpoints_is_not_overwritten(tmp_path: Path, resume: str) -> None:
    (tmp_path / "current.pth").write_bytes(b"somebody's model")
    assert str(tmp_path) in refusal(folder(tmp_path, resume=resume))
    assert (tmp_path / "current.pth").read_bytes() == b"somebody's model"


def test_a_path_names_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    run = folder(tmp_path / "old")
    run.prepare()
    save(run, 1, 2)
    first, second = run.checkpoints()
    assert folder(tmp_path / "new", resume=str(first)).prepare() == first
    assert folder(tmp_path / "newer", resume=str(tmp_path / "old")).prepare() == second
    # Of the folder itself, only the newest may be named: the others lie in its past.
    assert folder(tmp_path / "old", resume=str(second)).prepare() == second
    message = refusal(folder(tmp_path / "old", resume=str(first)))
    assert "newer checkpoints (step-00000002), which continuing would overwrite" in message


def test_a_path_that_cannot_be_resumed_from(tmp_path: Path) -> None:
    run = folder(tmp_path / "old")
    run.prepare()
    (tmp_path / "old" / "checkpoints").mkdir()
    new = tmp_path / "new"
    assert "no such folder" in refusal(folder(new, resume=str(tmp_path / "nowhere")))
    assert "no complete checkpoint" in refusal(folder(new, resume=str(tmp_path / "old")))
    assert "has no meta.json" in refusal(folder(new, resume=str(tmp_path)))
    assert "--resume is empty" in refusal(folder(new, resume=" "))
    assert "--resume xxx" in refusal(folder(new, resume="x" * 5000))
    save(run, 5)
    other = folder(new)
    other.prepare()
    save(other, 1)
    assert "another run" in refusal(folder(new, resume=str(run.checkpoints()[0])))
    assert steps(other) == [1]


def test_a_configuration_that_differs_is_listed(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    run.begin(0)
    save(run, 1)
    before = (tmp_path / "config.json").read_bytes()
    message = refusal(folder(tmp_path, fingerprint="g", nce_t=0.2, epochs=100, aug="v2"))
    lines = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert lines == [
        "--aug: 'cifar' in the run, 'v2' now",
        "--epochs: 200 in the run, 100 now",
        "--nce-t: 0.1 in the run, 0.2 now",
        "--data-dir: other images in data/cifar10 now",
    ]
    assert "another --output-dir for a new run" in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_how_a_run_is_carried_out_may_change(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.prepare()
    save(run, 1)
    again = folder(
        tmp_path,
        precision="bf16",
        num_workers=0,
        max_steps=7,
        save_freq=3,
        data_dir="moved",
        print_freq=1,
    )
    assert again.prepare() == run.checkpoints()[0]
    again.begin(1)
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16"


def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert f"--output-dir {file} is a file" in refusal(folder(file))
    assert f"--output-dir {file}/inside cannot be written" in refusal(folder(file / "inside"))

    # As root everything may be written, so the refusal is played.
    def refuse(self: Path, *args: Any, **keywords: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = refusal(folder(tmp_path / "closed"))
    assert message.startswith(f"--output-dir {tmp_path}/closed cannot be written: Permission")
    monkeypatch.undo()
    (tmp_path / "config.json").mkdir()  # in the way of the file of that name
    run = folder(tmp_path)
    run.prepare()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        run.begin(0)
