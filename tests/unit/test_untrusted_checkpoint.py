"""Checkpoints from outside: one changed bit, odd values, what does not fit, and files that grow."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import meta_json_target
import metadata_target
import model_file_target
import pytest
import torch
from checkpoint_errors import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moco_scale.__main__ import main
from moco_scale.checkpoints import checkpoint
from moco_scale.checkpoints.meta import parse_meta
from moco_scale.checkpoints.state import read_state
from moco_scale.methods.key_queue import KeyQueue
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import Encoder
from moco_scale.observe.loggers import Meters
from moco_scale.utils.errors import UserError


def written(folder: Path, **meta: Any) -> Path:
    values = {"step": 4, "epoch": 1, "samples": 32, "processes": 2, "engine": "ddp", "keep": False}
    config = {"dim": 3, "base_lr": 1e-5, "lr_decay_epochs": [120, 160]}
    checkpoint.save(folder, {"x": torch.ones(3)}, {**values, "config": config, **meta})
    return folder


def test_no_bit_of_the_plain_values_changes_unnoticed(tmp_path: Path) -> None:
    content = (written(tmp_path / "step-00000004") / "meta.json").read_bytes()
    assert parse_meta(content, "c")[1]
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(UserError):
            parse_meta(bytes(changed), "c")
    for cut in range(0, len(content), 7):
        with pytest.raises(UserError):
            parse_meta(content[:cut], "c")


def edited(folder: Path, **values: Any) -> Path:
    """Change plain values, as a file of an earlier version, which no checksum covers."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text()) | values
    del meta["own_crc32"]
    path.write_text(json.dumps(meta))
    return folder


def test_one_of_an_earlier_version_is_read_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "step-00000004")
    checkpoint.verify(folder)
    assert capsys.readouterr().err == ""
    edited(folder)
    checkpoint.verify(folder)
    assert "is of an earlier version: its meta.json has no checksum" in capsys.readouterr().err
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"epoch"', '"epocj"'))
    assert "lost its checksum" in error_of(lambda: checkpoint.verify(folder))


def test_the_step_is_the_folders(tmp_path: Path) -> None:
    folder = edited(written(tmp_path / "step-00000004"), step=5)
    assert "is of step 5" in error_of(lambda: checkpoint.read_meta(folder))
    assert checkpoint.read_meta(folder.rename(tmp_path / "elsewhere"))["step"] == 5


RECORD = {
    **{"step": 4, "loss": 1.0, "chance_loss": 1.0, "lr": 0.1},
    **{"images_per_second": 9.5, "data_wait_fraction": 0.0, "slowest_rank": 0},
}


@pytest.mark.parametrize(
    "odd",
    [
        {"step": 10**30},
        {"step": 1 << 53},
        {"files": {"x" * 300: 1}, "crc32": {"x" * 300: 1}},
        {"files": {"../../x": 1}, "crc32": {"../../x": 1}},
        {"crc32": {".metadata": 1 << 32, "__0_0.distcp": 0}},
        {"config": {"dim": "3"}},
        {"config": {"dim": 10**30}},
        {"config": {"dim": True}},
        {"config": {"shuffle_group": [8]}},
        {"config": {"symmetric": 1}},
        {"config": {"an odd\nname": 1}},
        {"config": {"new": {"deep": 1}}},
        {"config": dict.fromkeys(map("x{}".format, range(2000)), 1)},
        {"engine": "\x1b[2J"},
        {"engine": "x" * 10_000},
        {"data_fingerprint": 3},
        {"epoch": -1},
        {"unlogged": {"record": RECORD, "line": "a\nb"}},
        {"unlogged": {"record": RECORD | {"step": 5}, "line": "x"}},
        {"unlogged": {"record": RECORD | {"more": [1]}, "line": "x"}},
        {"unlogged": {"record": RECORD | {"\u2028": 1}, "line": "x"}},
        {"unlogged": {"record": {"step": 4}, "line": "x"}},
    ],
)
def test_values_that_no_run_writes_are_named(
    odd: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(written(tmp_path / "step-00000004", unlogged={"record": RECORD, "line": "x"}))
    assert checkpoint.read_meta(folder)["unlogged"]["record"] == RECORD
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    message = error_of(lambda: checkpoint.verify(folder))
    assert all(name in message for name in odd) and message.isprintable() and len(message) < 1500
    assert main(["inspect", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "DAMAGED" in shown and "\x1b" not in shown and "Traceback" not in shown


def test_deep_or_endless_json_is_an_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "step-00000004")
    for content in (b"[" * 100_000, b'{"format": 1, "x": ' + b'{"a":' * 5000, b"1" * 20_000_000):
        (folder / "meta.json").write_bytes(content)
        assert "\n" not in error_of(lambda: checkpoint.read_meta(folder))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_are_read_or_named(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happens to a file: a value or an error for people, see the targets."""
    target = data.draw(st.sampled_from([metadata_target, meta_json_target, model_file_target]))
    content = bytearray(data.draw(st.sampled_from(target.SEEDS())))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    folder = tmp_path / target.__name__
    folder.mkdir(exist_ok=True)
    target.run(bytes(content), folder)


class TestIndex:
    """What the index says of tensors must be so."""

    def changed(self, folder: Path, change: Callable[[Any, str], None]) -> str:
        checkpoint.save(folder, {"x": torch.ones(4, 3), "y": torch.tensor(3)}, {"step": 1})
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata, "x")
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        message = error_of(lambda: checkpoint.shapes(folder))
        assert message.startswith(f"checkpoint {folder} cannot be read: ")
        assert error_of(lambda: checkpoint.load(folder)) == message
        return message

    def test_sizes_and_places(self, tmp_path: Path) -> None:
        size = torch.Size

        def place(metadata: Any, name: str) -> Any:
            return next(p for i, p in metadata.storage_data.items() if i.fqn == name)

        def rename(metadata: Any, new: str) -> None:
            table = metadata.state_dict_metadata
            table[new] = table.pop("x")

        for number, change in enumerate(
            (
                lambda m, x: setattr(m.state_dict_metadata[x], "size", size((1 << 40, 3))),
                lambda m, x: setattr(m.state_dict_metadata[x], "size", size((5, 3))),
                lambda m, x: setattr(m.state_dict_metadata[x], "size", size((4, 2))),
                lambda m, x: setattr(m.state_dict_metadata[x].chunks[0], "sizes", size((3, 3))),
                lambda m, x: setattr(m.state_dict_metadata[x].chunks[0], "offsets", size((0, 1))),
                lambda m, x: setattr(m.state_dict_metadata[x].properties, "dtype", torch.int32),
                lambda m, x: m.state_dict_metadata[x].chunks.clear(),
                lambda m, x: m.state_dict_metadata[x].chunks.append(
                    m.state_dict_metadata[x].chunks[0]
                ),
                lambda m, x: setattr(place(m, x), "offset", 1 << 40),
                lambda m, x: setattr(place(m, x), "offset", -1),
                lambda m, x: setattr(place(m, x), "length", 1 << 60),
                lambda m, x: setattr(place(m, x), "length", 3),
                lambda m, x: setattr(place(m, x), "relative_path", "../elsewhere"),
                lambda m, x: setattr(place(m, x), "relative_path", "/etc/passwd"),
                lambda m, x: setattr(place(m, x), "relative_path", "missing"),
                lambda m, x: setattr(place(m, x), "relative_path", 3),
                lambda m, x: setattr(place(m, x), "transform_descriptors", ["zstd"]),
                lambda m, x: setattr(m, "storage_data", None),
                lambda m, x: setattr(m, "state_dict_metadata", [x]),
                lambda m, x: m.state_dict_metadata.pop(x),
                lambda m, x: m.storage_data.clear(),
                lambda m, x: rename(m, "../x"),
                lambda m, x: rename(m, "x" * 300),
                lambda m, x: rename(m, "x\x1b"),
            )
        ):
            message = self.changed(tmp_path / str(number), change)
            assert message.isprintable(), number

    def test_another_tensors_bytes_are_not_read_in_its_place(self, tmp_path: Path) -> None:
        folder = tmp_path / "c"
        checkpoint.save(folder, {"x": torch.ones(4, 3), "y": torch.ones(3, 4)}, {"step": 1})
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        first, second = metadata.storage_data.values()
        first.offset, second.offset = second.offset, first.offset
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        assert "does not hold what the index says" in error_of(lambda: checkpoint.load(folder))
        first.offset, second.offset = second.offset, first.offset
        metadata.state_dict_metadata["x"].properties.dtype = torch.int64
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        assert "does not hold what the index says" in error_of(lambda: checkpoint.load(folder))


BATCH, STEPS = 8, 10


def small_run(length: int = 37) -> tuple[Any, MoCo]:
    """What of a run its checkpoint is compared with: a step of 8 images, 5 steps an epoch."""
    backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    run = SimpleNamespace(
        queue=KeyQueue(length, 2, 0, "cpu"),
        meters=Meters(torch.device("cpu")),
        total_steps=STEPS,
        plan=SimpleNamespace(steps_per_epoch=5),
        config=SimpleNamespace(
            optim=SimpleNamespace(batch_size=BATCH), contrast=SimpleNamespace(symmetric=False)
        ),
    )
    return run, MoCo(Encoder(backbone, nn.Linear(3, 2), 3))


def state_of(run: Any, moco: MoCo) -> dict[str, Tensor]:
    """What such a run would save after 7 steps."""
    tensors = {f"model.{name}": t.clone() for name, t in moco.state_dict().items()}
    for name, parameter in moco.trained_parameters().items():
        tensors[f"optimizer.{name}.momentum_buffer"] = torch.zeros_like(parameter)
    run.queue.pointer, run.queue.enqueued = 7 * BATCH % 37, 7 * BATCH
    tensors |= {f"queue.{name}": t.clone() for name, t in run.queue.state_dict().items()}
    return tensors | {"meters.sums": run.meters.sums.clone()}


META = {"step": 7, "epoch": 1, "samples": 56}
WEIGHT = "model.query.backbone.0.weight"
NAN, INF = float("nan"), float("inf")


def scale(*values: float) -> dict[str, Tensor]:
    return {"loss_scale.state": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("changes", "meta", "expected"),
    [
        ({WEIGHT: None}, {}, f"it lacks {WEIGHT}"),
        ({"model.key.backbone.1.running_var": None}, {}, "it lacks model.key.backbone.1.running_v"),
        ({"optimizer.query.head.bias.momentum_buffer": None}, {}, "it lacks optimizer.query.head"),
        ({"meters.sums": None}, {}, "it lacks meters.sums"),
        ({"queue.pointer": None}, {}, "it lacks queue.pointer"),
        ({"model.extra": torch.ones(2)}, {}, "it has model.extra, which is unknown"),
        ({WEIGHT: torch.ones(4, 3)}, {}, f"{WEIGHT} is float32 [4, 3], float32 [3, 4] expected"),
        ({WEIGHT: torch.ones(3, 4).double()}, {}, "float64 [3, 4], float32 [3, 4] expected"),
        ({"meters.sums": torch.ones(2, 4).double()}, {}, "meters.sums is float64 [2, 4]"),
        ({"queue.keys": torch.ones(36, 2)}, {}, "queue.keys is float32 [36, 2], float32 [37, 2]"),
        ({"queue.keys": torch.ones(37, 3)}, {}, "queue.keys is float32 [37, 3]"),
        ({"queue.pointer": torch.tensor(37)}, {}, "queue.pointer is 37, 19 after 56 keys"),
        ({"queue.pointer": torch.tensor(-1)}, {}, "queue.pointer is -1"),
        ({"queue.enqueued": torch.tensor(57)}, {}, "queue.enqueued is 57, at most 56"),
        ({"queue.enqueued": torch.tensor(-1)}, {}, "queue.enqueued is -1"),
        ({"queue.pointer": torch.tensor(1.5)}, {}, "queue.pointer is float32 [], int64 [] expec"),
        ({WEIGHT: torch.full((3, 4), NAN)}, {}, f"{WEIGHT} is not finite"),
        ({"queue.keys": torch.full((37, 2), INF)}, {}, "queue.keys is not finite"),
        (scale(0, 3), {}, "the loss scale is 0"),
        (scale(INF, 3), {}, "the loss scale is inf"),
        (scale(NAN, 3), {}, "the loss scale is nan"),
        (scale(-1, 3), {}, "the loss scale is -1"),
        (scale(4, NAN), {}, "after nan steps"),
        (scale(4, -1), {}, "after -1 steps"),
        (scale(4, INF), {}, "after inf steps"),
        ({}, {"samples": 48}, "samples is 48, 56 at step 7"),
        ({}, {"epoch": 2}, "epoch is 2, 1 at step 7"),
        ({}, {"step": 11, "samples": 88, "epoch": 2}, "step 11 is beyond the run's 10 steps"),
    ],
)
def test_what_does_not_fit_the_run_is_named(
    changes: dict[str, Tensor | None], meta: dict[str, int], expected: str, tmp_path: Path
) -> None:
    run, moco = small_run()
    tensors = {n: t for n, t in (state_of(run, moco) | changes).items() if t is not None}
    checkpoint.save(tmp_path / "c", tensors, META | meta)
    message = error_of(lambda: read_state(run, moco, tmp_path / "c"))
    assert expected in message and "does not fit this run" in message and "\n" not in message


def test_what_fits_is_read_and_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    run, moco = small_run()
    tensors = state_of(run, moco)
    checkpoint.save(tmp_path / "good", tensors | scale(65536, 7), META)
    _, saved = read_state(run, moco, tmp_path / "good")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    rest = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    checkpoint.save(tmp_path / "bad", rest | {WEIGHT: torch.ones(1)}, META)
    message = error_of(lambda: read_state(run, moco, tmp_path / "bad"))
    assert message.count("it lacks optimizer.") == 5 and " and 2 more;" in message


def test_rows_of_a_tensor_that_has_others_are_not_made_up(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"x": torch.ones(4, 3), "y": torch.tensor(1)}, {"step": 1})
    for name in "xy":
        rows = {name: checkpoint.Rows(3, 3, 6)}
        assert "6 rows" in error_of(lambda rows=rows: checkpoint.load(tmp_path / "c", rows))  # type: ignore[misc]
