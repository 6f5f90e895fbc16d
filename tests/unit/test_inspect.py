"""What `python -m moco_scale inspect` says of a checkpoint, whole and damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moco_scale.__main__ import main
from moco_scale.checkpoints import checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint."""
    tensors = {
        "model.query.weight": torch.ones(3, 4),
        "model.key.weight": torch.ones(3, 4),
        "optimizer.query.weight.momentum_buffer": torch.zeros(3, 4),
        "queue.keys": torch.ones(8, 2),
        "queue.pointer": torch.tensor(5),
    }
    meta = {"step": 7, "epoch": 1, "samples": 56, "processes": 2, "engine": "fsdp", "keep": False}
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    checkpoint.save(folder, tensors, {**meta, "config": {"nce_k": 8}})
    return tmp_path / "run"


def test_it_says_who_wrote_what(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"].endswith("step-00000007")
    assert found["damage"] is None
    wanted = {"step": 7, "epoch": 1, "samples": 56, "processes": 2, "engine": "fsdp"}
    assert wanted.items() <= found.items()
    assert found["parts"]["model.query"] == {"tensors": 1, "numbers": 12, "bytes": 48}
    assert found["parts"]["queue"] == {"tensors": 2, "numbers": 17, "bytes": 72}
    assert found["tensors"]["queue.keys"] == [8, 2]
    assert main(["inspect", str(saved / "checkpoints" / "step-00000007"), "--tensors"]) == 0
    text = capsys.readouterr().out
    for part in ("complete", "step 7", "2 process(es) under fsdp", "--nce-k", "queue.keys"):
        assert part in text


def test_a_changed_byte_is_damage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved / "checkpoints" / "step-00000007"
    (data,) = folder.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(checkpoint.UserError, match=f"content of {data.name}"):
        checkpoint.verify(folder)
    assert main(["inspect", str(saved)]) == 1
    assert f"DAMAGED: checkpoint {folder} is damaged: the content" in capsys.readouterr().out


def test_a_missing_file_is_damage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "checkpoints" / "step-00000007" / ".metadata").unlink()
    assert main(["inspect", str(saved), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert ".metadata is missing" in found["damage"] and found["step"] == 7


def test_what_training_passes_over_is_listed(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / "checkpoints" / "step-00000009").mkdir()
    assert main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"].endswith("step-00000007")
    assert found["incomplete"] == ["step-00000009"]
    assert main(["inspect", str(saved)]) == 0
    assert "step-00000009 is incomplete" in capsys.readouterr().out
    shutil.rmtree(saved / "checkpoints" / "step-00000007")
    assert main(["inspect", str(saved)]) == 2
    assert "step-00000009 in it: incomplete" in capsys.readouterr().err


def test_values_of_another_kind_are_damage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved / "checkpoints" / "step-00000007" / "meta.json"
    whole = json.loads(path.read_text())
    for name in ("files", "config", "step"):
        path.write_text(json.dumps(whole | {name: ["x"]}))
        assert main(["inspect", str(saved)]) == 1
        assert f"no usable value: {name}: " in capsys.readouterr().out


def test_what_is_no_checkpoint_is_an_error(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, text in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "neither a")):
        assert main(["inspect", str(path)]) == 2
        assert text in capsys.readouterr().err
    shutil.rmtree(saved / "checkpoints" / "step-00000007")
    assert main(["inspect", str(saved)]) == 2


def test_a_model_for_evaluation_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "current.pth"
    opt = {"model": "resnet18", "nce_k": 8}
    state = {"backbone.weight": torch.ones(3, 4)}
    torch.save({"opt": opt, "model": state, "model_ema": state, "epoch": 2, "step": 9}, path)
    assert main(["inspect", str(path), "--tensors"]) == 0
    text = capsys.readouterr().out
    for part in ("eval.py", "step 9, epoch 2", "12 numbers", "--nce-k", "model_ema.backbone"):
        assert part in text
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["model"] == {"backbone.weight": [3, 4]} and found["config"] == opt


@pytest.mark.parametrize("content", [b"rubbish", None])
def test_a_file_that_is_no_model_is_an_error(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    torch.save({"step": 1}, path)
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    assert "current.pth" in capsys.readouterr().err


def test_no_part_of_a_flags_name_will_do(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(saved), "--tens"])
    assert "unrecognized arguments: --tens" in capsys.readouterr().err
