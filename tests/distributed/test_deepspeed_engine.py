"""DeepSpeed's own matters: the GPU it addresses, what it refuses, what gathering waits for."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from small_engines import ALPHA, MOMENTUM, RATE, SIZE, engine_around, small_encoder

from moco_scale.engines.base import EngineSettings
from moco_scale.methods.moco import MoCo
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log

pytestmark = pytest.mark.timeout(600)


def on_the_only_gpu_in_sight() -> tuple[list[str], dict[str, str | None]]:
    """GPUs that DeepSpeed addresses in the fourth process of a host that sees one GPU alone."""
    from deepspeed.accelerator import get_accelerator

    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    os.environ.update(dict.fromkeys(names, "3"))
    accelerator, addressed = get_accelerator(), []

    def device_name(number: int | str | None = None) -> str:
        addressed.extend([str(number)] if str(number).isdigit() else [])
        return "cpu"

    accelerator.set_device, accelerator.device_name = device_name, device_name
    moco = MoCo(small_encoder())
    engine_around("zero3", moco, EngineSettings(MOMENTUM, 1e-4), device=torch.device("cuda", 0))
    return addressed, {name: os.environ.get(name) for name in names}


def test_deepspeed_uses_the_only_gpu_that_a_scheduler_shows() -> None:
    ((addressed, after),) = run_ranks(on_the_only_gpu_in_sight, 1)
    assert addressed and set(addressed) == {"0"}
    assert set(after.values()) == {"3"}  # others ask who is the first on a host


def refusals(contents: list[dict[str, Any]], folder: str) -> list[str]:
    """What is said of DeepSpeed files, DeepSpeed itself having been asked."""
    from moco_scale.config.command_line import parse
    from moco_scale.engines import read_deepspeed

    said = []
    for content in contents:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(content))
        try:
            read = read_deepspeed(parse(["--deepspeed", str(path), "--batch-size", "8"]), 1, 1000)
            said.append("\n".join(read.notes))
        except UserError as error:
            said.append(str(error))
    return said


def test_what_deepspeed_refuses_is_a_users_error(tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "zero_optimization.reduce_bucket_size 'big'": {
            "zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}
        },
        "zero_optimization.stagee 3": {"zero_optimization": {"stagee": 3}},
        "tensorboard.job_name 3": {
            "tensorboard": {"enabled": True, "job_name": 3},
            "zero_optimization": {"stage": 1},
        },
        "comms_logger 3": {"comms_logger": 3},
    }
    together = {
        "train_batch_size": 999,
        "zero_optimisation": {"stage": 1},
        "optimizer": {"type": "Adam"},
        "csv_monitor": {"enabled": True, "output_path": {}},
        "zero_optimization": {"stage": 2, "contiguous_gradients": "x", "round_robin": 1},
        "fp16": {"enabled": "yes"},
    }
    quiet = {"gradient_clipping": 0}
    (said,) = run_ranks(refusals, 1, [quiet, *wrong.values(), together], str(tmp_path))
    assert said[0] == ""
    for name, message in zip(wrong, said[1:], strict=False):
        assert message.startswith(f"DeepSpeed configuration {tmp_path}/ds.json: ")
        assert name in message
    first, *problems = said[-1].splitlines()
    assert first == f"DeepSpeed configuration {tmp_path}/ds.json:"
    for name in (
        *("train_batch_size 999", "zero_optimisation is unknown", "'optimizer' section"),
        *("csv_monitor.output_path {}", "zero_optimization.contiguous_gradients 'x'"),
        *("zero_optimization.round_robin 1", "fp16.enabled 'yes'"),
    ):
        assert sum(line.startswith(("  " + name, "  its " + name)) for line in problems) == 1, name
    assert len(problems) == 7


def order_of_gathers(of_its_own: bool) -> list[str]:
    """What the stream that gathers waits for after a step and after the average."""
    from moco_scale.engines.deepspeed import GATHERS

    moco = MoCo(small_encoder())
    engine = engine_around("zero3", moco, EngineSettings(MOMENTUM, 1e-4))
    offload = engine._optimizer.parameter_offload  # type: ignore[attr-defined]
    assert hasattr(offload, GATHERS)  # DeepSpeed still calls it so
    done: list[str] = []

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            done.append("waits" if other is not self else "for itself")

        def synchronize(self) -> None:
            done.append("stops")

    setattr(offload, GATHERS, Stream() if of_its_own else None)
    setattr(torch.cuda, "current_stream", lambda device: Stream())  # noqa: B010
    (query,) = engine.query(torch.ones(4, 3, SIZE, SIZE))
    engine.backward(query[:, 0].mean())
    engine.device = torch.device("cuda", 0)
    engine.step(RATE)
    done.append("step")
    engine.ema(ALPHA)
    return done


def test_stage_3_gathers_what_was_written_last() -> None:
    assert run_ranks(order_of_gathers, 1, True) == [["waits", "step", "waits"]]
    assert run_ranks(order_of_gathers, 1, False) == [["stops", "step", "stops"]]


def reports(folder: str) -> tuple[list[str], list[str], list[str]]:
    """What DeepSpeed's log says of a step that it reports, the files it writes, and what follows
    when it cannot write them."""
    from deepspeed.utils import logger

    from moco_scale.config.deepspeed_file import look_through
    from moco_scale.engines import deepspeed as module

    path = Path(folder) / "ds.json"
    content = {
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1,
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"},
    }
    path.write_text(json.dumps(content))
    read = look_through(
        str(path),
        batch_size=4,
        world=1,
        precision="fp32",
        clip_norm=0.0,
        micro_batches=1,
        parameters=1000,
        overlap=False,
        compiled=False,
    )
    engine = module.DeepSpeedEngine(
        MoCo(small_encoder()),
        EngineSettings(MOMENTUM, 1e-4),
        torch.device("cpu"),
        read.configuration,
    )
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    said: list[str] = []
    ours = logging.Handler()
    ours.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(ours)

    def step() -> None:
        (query,) = engine.query(torch.ones(4, 3, SIZE, SIZE))
        engine.backward(query[:, 0].mean())
        assert engine.step(RATE)

    step()
    written = [p.name for p in (Path(folder) / "job").iterdir()]
    monitor = engine._engine.monitor.csv_monitor
    monitor.write_events = lambda events: (Path(folder) / "ds.json" / "x").write_text("")
    step()
    step()
    return heard, written, said


def test_what_a_file_asks_deepspeed_to_report_is_seen(tmp_path: Path) -> None:
    ((heard, written, said),) = run_ranks(reports, 1, str(tmp_path))
    assert any("step=1" in line for line in heard)
    assert "Train_Samples_lr.csv" in written
    assert len(said) == 1 and "DeepSpeed cannot report" in said[0]  # and training went on
