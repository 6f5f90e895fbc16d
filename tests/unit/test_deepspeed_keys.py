"""Keys of a DeepSpeed JSON: each has an effect, is said to have none, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_files import complete, leaves, read, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moco_scale.config import deepspeed_keys
from moco_scale.config.command_line import parse
from moco_scale.untrusted import deepspeed_file
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

SILENT = """
    activation_checkpointing aio autotuning checkpoint compile datastates_ckpt dataloader_drop_last
    dump_state elasticity eigenvalue graph_harvesting nebula pipeline sparse_gradients
    use_data_before_expert_parallelism vocabulary_size zero_force_ds_cpu_optimizer
"""
OF_ANOTHER_RUN = """
    amp communication_data_type compression_training curriculum_learning data_efficiency
    expert_parallel hybrid_engine progressive_layer_drop quantize_training sparse_attention
    tensor_parallel weight_quantization
"""
AFTER_A_STEP = "tensorboard csv_monitor flops_profiler wall_clock_breakdown steps_per_print timers"


def asking(key: str) -> Any:
    """A value by which a key asks for something."""
    return {
        **dict.fromkeys(("vocabulary_size", "steps_per_print"), 7),
        **dict.fromkeys(("dump_state", "sparse_gradients", "wall_clock_breakdown"), True),
        "zero_force_ds_cpu_optimizer": True,
        "timers": {"throughput": {"enabled": True}},
        "communication_data_type": "bf16",
    }.get(key, {"enabled": True, "x": 1} if key in ("amp", "aio") else {"enabled": True})


@pytest.mark.parametrize("key", SILENT.split())
def test_no_section_is_silently_without_effect(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, {"gradient_clipping": 0, key: asking(key)})
    done = complete(path)
    (note,) = done.notes
    assert f"{key} has no effect: " in note and key not in done.configuration
    # What asks for nothing is no news, and nothing that DeepSpeed might refuse.
    fits, _, _ = deepspeed_file._TYPES.get(key, (lambda value: True, "", False))
    for off in (off for off in ({"enabled": False}, {}, False, None) if off is None or fits(off)):
        assert complete(write(tmp_path, {"gradient_clipping": 0, key: off})).notes == []


@pytest.mark.parametrize("key", OF_ANOTHER_RUN.split())
def test_a_section_that_makes_another_run_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"ds\.json: {key} is not done here: .*; remove it"):
        read(write(tmp_path, {key: asking(key)}))
    assert key not in read(write(tmp_path, {key: None}))


@pytest.mark.parametrize("key", AFTER_A_STEP.split())
def test_stage_0_says_what_it_cannot_report(tmp_path: Path, key: str) -> None:
    content = {"gradient_clipping": 0, key: asking(key)}
    if key == "timers":
        content["steps_per_print"] = 5
    notes = complete(write(tmp_path, content)).notes
    assert any(f"{key} has no effect at stage 0" in note for note in notes)
    done = complete(write(tmp_path, content | {"zero_optimization": {"stage": 1}}))
    assert done.notes == [] and done.configuration[key] == asking(key)


def test_every_key_of_deepspeed_is_decided_upon(tmp_path: Path) -> None:
    decided = {
        *deepspeed_keys._REFUSED,
        *deepspeed_keys._WITHOUT_EFFECT,
        *deepspeed_keys._REPORTS,
        *("bf16", "fp16", "torch_autocast", "optimizer", "scheduler", "zero_optimization"),
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("gradient_clipping", "zero_allow_untested_optimizer", "comms_logger", "data_types"),
        # DeepSpeed does these whatever the stage.
        *("log_level", "memory_breakdown", "disable_python_gc"),
    }
    assert decided >= deepspeed_keys.KNOWN


def test_a_monitor_without_its_package_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    zero = {"stage": 1}
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorb")):
        content = {name: {"enabled": True}, "zero_optimization": zero}
        with pytest.raises(UserError, match=rf"{name} needs a package .*pip install {package}"):
            read(write(tmp_path, content))
        read(write(tmp_path, {name: {"enabled": False}, "zero_optimization": zero}))


def test_reports_that_print_nothing_say_so(tmp_path: Path) -> None:
    def notes(content: dict[str, Any]) -> list[str]:
        usual = {"gradient_clipping": 0, "zero_optimization": {"stage": 1}}
        done = complete(write(tmp_path, usual | content))
        assert not content.keys() & done.configuration.keys() - {"timers"}
        return done.notes

    (comms,) = notes({"comms_logger": {"enabled": True}})
    assert 'without "enabled": true and "verbose": true' in comms
    (board,) = notes({"tensorboard": {"output_path": "x"}})
    assert 'tensorboard has no effect without "enabled": true' in board
    (timers,) = notes({"timers": {"throughput": {"enabled": True}}})
    assert "without steps_per_print" in timers
    assert notes({"comms_logger": {"enabled": False}}) == []


def test_what_belongs_to_another_stage_is_named(tmp_path: Path) -> None:
    zero = {"stage3_max_live_parameters": 10, "sub_group_size": 5, "reduce_bucket_size": 5}
    for stage, named in ((0, "reduce_bucket_size, stage3_max_live_parameters, sub_group_size"),):
        content = {"gradient_clipping": 0, "zero_optimization": {"stage": stage, **zero}}
        (note,) = complete(write(tmp_path, content)).notes
        assert note.endswith(f"zero_optimization at stage {stage}: {named} without effect")
    content = {"gradient_clipping": 0, "zero_optimization": {"stage": 2, **zero}}
    done = complete(write(tmp_path, content))
    assert done.notes[0].endswith("stage3_max_live_parameters, sub_group_size without effect")
    zero = {"stage": 3, "param_persistence_threshold": 77}  # DeepSpeed's other name for it
    done = complete(write(tmp_path, {"zero_optimization": zero}))
    section = done.configuration["zero_optimization"]
    assert section["stage3_param_persistence_threshold"] == 0
    assert "param_persistence_threshold" not in section


def test_a_bucket_is_no_larger_than_what_there_is(tmp_path: Path) -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 1 << 60}
    section = read(write(tmp_path, {"zero_optimization": zero}), parameters=1000)
    assert section["zero_optimization"]["reduce_bucket_size"] == 1000
    assert section["zero_optimization"]["allgather_bucket_size"] == 1000


def test_optimizer_state_may_live_on_the_cpu(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    got = read(write(tmp_path, {"zero_optimization": zero}))
    assert got["zero_optimization"]["offload_optimizer"] == zero["offload_optimizer"]
    assert got["zero_force_ds_cpu_optimizer"] is False
    none = {"stage": 0, "offload_optimizer": {"device": "none"}}
    assert "offload_optimizer" not in read(write(tmp_path, {"zero_optimization": none}))


def test_stage_3_cannot_be_compiled(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"--compile .* stage 3, .*--engine fsdp"):
        read(path, compiled=True)
    assert read(write(tmp_path, {"zero_optimization": {"stage": 2}}), compiled=True)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["auto", "fp32", "bf16", "cpu", "none", "info", "", "\x1b[2J", "é"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["enabled", "stage", "device", "dtype", "throughput", "loss_scale"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
PLACES = sorted(
    {
        *deepspeed_keys.KNOWN,
        *deepspeed_keys._REFUSED,
        *deepspeed_keys._WITHOUT_EFFECT,
        *deepspeed_file._TYPES,
        *(f"fp16.{key}" for key in ("loss_scale", "initial_scale_power", "min_loss_scale")),
        *(f"zero_optimization.{key}" for key in ("offload_param", "cpu_offload", "stage3_x")),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    values=st.dictionaries(st.sampled_from(PLACES) | st.text(max_size=6), VALUES, max_size=5),
    stage=st.sampled_from([0, 1, 2, 3, None]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
)
def test_whatever_a_file_holds_is_read_or_named(
    tmp_path: Path, values: dict[str, Any], stage: int | None, precision: str
) -> None:
    content: dict[str, Any] = {} if stage is None else {"zero_optimization": {"stage": stage}}
    for place, value in values.items():
        *sections, key = place.split(".")
        holder = content
        for name in sections:
            if not isinstance(holder.get(name), dict):
                holder[name] = {}
            holder = holder[name]
        holder[key] = value
    path = write(tmp_path, json.dumps(content))
    try:
        done = complete(path, precision=precision)
        said = done.notes
        assert "auto" not in leaves(done.configuration["zero_optimization"])
        parse(["--deepspeed", path])
    except UserError as error:
        said = str(error).splitlines()
    assert [printable(line, 10**5) for line in said] == said


def test_places_of_reports_are_looked_at_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    good = {
        "tensorboard": {"enabled": True, "output_path": str(tmp_path / "new" / "board")},
        "csv_monitor": {"enabled": True, "output_path": ""},
        "flops_profiler": {"enabled": True, "output_file": str(tmp_path / "flops.txt")},
    }
    assert deepspeed_keys.unwritable_reports(good) == []
    assert deepspeed_keys.unwritable_reports({}) == []
    bad = {
        "tensorboard": {"enabled": True, "output_path": "/proc/board"},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "file" / "csv")},
        "flops_profiler": {"enabled": True, "output_file": str(tmp_path)},
    }
    lines = deepspeed_keys.unwritable_reports(bad)
    assert [line.split(" ")[0] for line in lines] == [
        "tensorboard.output_path",
        "csv_monitor.output_path",
        "flops_profiler.output_file",
    ]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
