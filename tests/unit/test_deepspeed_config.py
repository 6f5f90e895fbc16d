"""A DeepSpeed JSON: its automatic values filled in, its contradictions named."""

from pathlib import Path
from typing import Any

import pytest
from deepspeed_files import complete, leaves, read, scaling, write

from moco_scale.config.command_line import parse
from moco_scale.config.deepspeed_file import (
    requested_precision,
)
from moco_scale.optim.loss_scale import LossScaling
from moco_scale.utils.errors import UserError


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_shipped_files_fit_every_run(repository: Path, stage: int, precision: str) -> None:
    path = str(repository / "ds_configs" / f"zero{stage}.json")
    got = read(path, precision=precision)
    assert "auto" not in leaves(got)
    assert got["train_batch_size"] == 256
    assert got["train_micro_batch_size_per_gpu"] == 32
    assert got["gradient_accumulation_steps"] == 1
    assert got["gradient_clipping"] == 0.0  # DeepSpeed's own default would clip at 1
    assert got["zero_allow_untested_optimizer"] is True
    assert got["zero_optimization"]["stage"] == stage
    # They would round the weights themselves, or sum gradients in half precision.
    assert not {"bf16", "fp16", "torch_autocast"} & got.keys()
    if stage in (1, 2):
        # A step with a gradient that is not finite is left out where the loss is scaled only.
        assert got["zero_optimization"]["compute_grad_norm"] is (precision == "fp16")
    if stage == 3:
        assert got["zero_optimization"]["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_shipped_files_have_names_in_any_folder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse(["--deepspeed", f"zero{stage}", "--precision", "fp16"])
    assert (config.run.precision, config.run.engine) == ("fp16", "deepspeed")
    got = complete(f"zero{stage}", precision="fp16")
    assert (got.scaling, got.notes) == (LossScaling(), [])
    assert got == complete(str(repository / "ds_configs" / f"zero{stage}.json"), precision="fp16")
    (tmp_path / f"zero{stage}").write_text('{"gradient_clipping": 2}')
    assert parse(["--deepspeed", f"zero{stage}"]).optim.clip_grad == 2, "a file of that name wins"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("folder", ["", "ds_configs/", "/no/such/"])
def test_files_of_earlier_versions_are_named_anew(precision: str, folder: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(["--deepspeed", f"{folder}zero1_{precision}.json"])
    remedy = f"--deepspeed {folder}zero1.json --precision {precision}"
    assert str(refused.value).endswith(f"zero1_{precision}.json is gone: say {remedy}")


def test_an_empty_file_is_filled_in_too(tmp_path: Path) -> None:
    got = read(write(tmp_path, {}), batch_size=64, world=2)
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"]) == (64, 32)
    assert got["gradient_clipping"] == 0.0
    assert got["zero_optimization"] == {"stage": 0}


def test_buckets_and_overlap_follow_the_model_and_the_device(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 1, "overlap_comm": "auto"}})
    small = read(path, parameters=1000, overlap=False)["zero_optimization"]
    assert small["reduce_bucket_size"] == small["allgather_bucket_size"] == 1000
    assert small["overlap_comm"] is False
    resnet50 = read(path, parameters=28_000_000)["zero_optimization"]
    assert resnet50["reduce_bucket_size"] == 3_500_000
    large = read(path, parameters=10**9, overlap=True)["zero_optimization"]
    assert large["reduce_bucket_size"] == 50_000_000
    assert large["overlap_comm"] is True
    zero = {"stage": 1, "reduce_bucket_size": 77, "overlap_comm": False}
    chosen = read(write(tmp_path, {"zero_optimization": zero}))["zero_optimization"]
    assert (chosen["reduce_bucket_size"], chosen["overlap_comm"]) == (77, False)


def test_values_that_agree_and_unknown_sections_pass_through(tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0,
        "fp16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    got = read(write(tmp_path, content))
    assert got["wall_clock_breakdown"] is True
    assert got["train_batch_size"] == 256


@pytest.mark.parametrize(
    ("section", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": "auto"}}, "fp32"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16"),
        ({"torch_autocast": {"enabled": "auto"}}, "fp32"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "fp16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
    ],
)
def test_a_file_may_choose_the_precision(
    tmp_path: Path, section: dict[str, Any], precision: str
) -> None:
    path = write(tmp_path, section)
    assert requested_precision(path) == precision
    assert not section.keys() & read(path, precision=precision).keys()


def test_an_fp16_section_sets_the_loss_scale(tmp_path: Path) -> None:
    usual = LossScaling(initial=65536.0, window=2000, minimum=1.0)
    assert scaling(write(tmp_path, {})) == usual
    auto = {"enabled": True, "loss_scale": 0, "initial_scale_power": "auto", "hysteresis": 2}
    assert scaling(write(tmp_path, {"fp16": auto})) == usual
    section = {"initial_scale_power": 8, "loss_scale_window": 100, "min_loss_scale": 0.5}
    path = write(tmp_path, {"fp16": {"enabled": "auto", **section}})
    assert scaling(path) == LossScaling(initial=256.0, window=100, minimum=0.5)


# What the file says, the precision of the flags, and what the message must name.
CONTRADICTIONS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"train_batch_size": 128}, "fp32", ("train_batch_size 128", "--batch-size 256")),
    (
        {"train_micro_batch_size_per_gpu": 64},
        "fp32",
        ("train_micro_batch_size_per_gpu 64", "--batch-size 256 over 8 processes", "32"),
    ),
    (
        {"gradient_accumulation_steps": 4},
        "fp32",
        ("gradient_accumulation_steps 4", "--accumulation-steps 1"),
    ),
    ({"gradient_clipping": 1.0}, "fp32", ("gradient_clipping 1.0", "--clip-grad 0.0")),
    ({"optimizer": {"type": "Adam"}}, "fp32", ("'optimizer'", "--base-lr", "--weight-decay")),
    ({"scheduler": {"type": "WarmupLR"}}, "fp32", ("'scheduler'", "--lr-scheduler")),
    ({"fp16": {"enabled": True}}, "fp32", ("fp16", "--precision is fp32")),
    ({"fp16": {"enabled": True}}, "bf16", ("fp16", "--precision is bf16")),
    ({"bf16": {"enabled": True}}, "fp32", ("bf16 is enabled", "--precision is fp32")),
    ({"bf16": {"enabled": False}}, "bf16", ("bf16 is disabled", "--precision is bf16")),
    (
        {"torch_autocast": {"enabled": True}},
        "fp32",
        ("torch_autocast is enabled", "--precision is fp32"),
    ),
    (
        {"torch_autocast": {"enabled": False}},
        "bf16",
        ("torch_autocast is disabled", "--precision is bf16"),
    ),
    (
        {"zero_allow_untested_optimizer": False},
        "fp32",
        ("zero_allow_untested_optimizer False", "--deepspeed"),
    ),
    ({"communication_data_type": "bf16"}, "fp32", ("communication_data_type", "remove it")),
    ({"gradient_predivide_factor": 2.0}, "fp32", ("gradient_predivide_factor", "remove it")),
    ({"gradient_allreduce_op": "sum"}, "fp32", ("gradient_allreduce_op", "remove it")),
    ({"managed_gradient_accumulation": False}, "fp32", ("managed_gradient_accumul", "remove it")),
    ({"sequence_parallel_size": 2}, "fp32", ("sequence_parallel_size", "remove it")),
    ({"tensor_parallel": {"autotp_size": 2}}, "fp32", ("tensor_parallel", "remove it")),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16", ("data_types.grad_accum", "remove it")),
    ({"data_types": "bf16"}, "bf16", ("data_types 'bf16': must be a JSON object",)),
    *(
        (
            {"zero_optimization": {"stage": 3, key: value}},
            "fp32",
            (f"zero_optimization.{key}", "remove it"),
        )
        for key, value in (
            ("zero_quantized_weights", True),
            ("zero_quantized_nontrainable_weights", True),
            ("zero_quantized_gradients", True),
            ("zero_hpz_partition_size", 8),
            ("mics_shard_size", 8),
            ("zenflow", {}),
            ("leaf_module", {"classes": ["x"]}),
            ("stage3_module_granularity_threshold", 5),
        )
    ),
    *(
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", key: value}}},
            "fp32",
            (f"offload_optimizer.{key} is not done here", "remove it"),
        )
        for key, value in (("ratio", 0.5), ("super_offload", True))  # both train with Adam
    ),
    ({"flops_profiler": {"profil_step": 3}}, "fp32", ("flops_profiler.profil_step is unknown",)),
    ({"zero_optimisation": {"stage": 3}}, "fp32", ("zero_optimisation", "zero_optimization?")),
    ({"bfloat16": {"enabled": True}}, "fp32", ("bfloat16 is unknown", "bf16?")),
    ({"fp16": {"inital_scale_power": 8}}, "fp16", ("fp16.inital_scale_power", "initial_scale_po")),
    ({"zero_optimization": {"stage": True}}, "fp32", ("zero_optimization.stage True",)),
    ({"zero_optimization": {"stage": 1.0}}, "fp32", ("zero_optimization.stage 1.0",)),
    ({"fp16": {"enabled": "false"}}, "fp32", ("fp16.enabled 'false'", "true, false")),
    ({"bf16": {"enabled": 1}}, "bf16", ("bf16.enabled 1", "true, false")),
    ({"torch_autocast": {"enabled": "yes"}}, "bf16", ("torch_autocast.enabled 'yes'",)),
    ({"timers": {"throughput": True}}, "fp32", ("timers.throughput True: must be",)),
    ({"fp16": {"initial_scale_power": 4000}}, "fp16", ("initial_scale_power 4000", "127")),
    ({"fp16": {"min_loss_scale": 0}}, "fp16", ("min_loss_scale 0",)),
    (
        {"fp16": {"initial_scale_power": 3, "min_loss_scale": 16}},
        "fp16",
        ("min_loss_scale 16", "begins with, 8"),
    ),
    ({"fp16": {"loss_scale": False}}, "fp16", ("loss_scale False", "set it to 0")),
    ({"fp16": {"loss_scale": "0"}}, "fp16", ("loss_scale '0'", "set it to 0")),
    (
        {"zero_optimization": {"stage": 1, "cpu_offload": True}},
        "fp32",
        ("zero_optimization.cpu_offload",),
    ),
    (
        {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Conv2d"]}},
        "bf16",
        ("lower_precision_safe_modules", "remove it"),
    ),
    (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        "bf16",
        ("torch_autocast.dtype 'float16'", "--precision bf16"),
    ),
    ({"zero_optimization": {"stage": 4}}, "fp32", ("zero_optimization.stage 4", "0, 1, 2, 3")),
    ({"fp16": {"enabled": False}}, "fp16", ("fp16 is disabled", "--precision fp32")),
    ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16", ("loss_scale 128", "set it to 0")),
    ({"fp16": {"initial_scale_power": "big"}}, "fp16", ("initial_scale_power 'big'",)),
    ({"fp16": {"loss_scale_window": -1}}, "fp16", ("loss_scale_window -1",)),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        "fp32",
        ("zero_optimization.offload_optimizer", "'nvme'", "cpu"),
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "fp32",
        ("offload_optimizer needs", "stage 1, 2 or 3"),
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        "fp32",
        ("zero_optimization.offload_param", "offload_optimizer"),
    ),
]


@pytest.mark.parametrize(("content", "precision", "names"), CONTRADICTIONS, ids=str)
def test_a_contradiction_names_the_file_its_key_and_the_flag(
    tmp_path: Path, content: dict[str, Any], precision: str, names: tuple[str, ...]
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        read(path, precision=precision)
    assert path in str(error.value)
    for name in names:
        assert name in str(error.value)


BROKEN = ['{"train_batch_size": ', "", "[1, 2]", '"auto"', "null", '{"bf16": true}']
BROKEN += ['{"a": 1, "a": 2}', '{"fp16": {"x": 1, "x": 1}}', '{"steps_per_print": NaN}']
BROKEN += ['{"gradient_clipping": Infinity}', '{"gradient_clipping": 1e999}', "[" * 5000]
BROKEN += ['{"a":' * 300 + "1" + "}" * 300, '{"x": ' + "9" * 5000 + "}", '{"x": "\\ud800"}']
BROKEN += ['{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e300}}', "{\0}"]
BROKEN += ['{"gradient_clipping": ' + "9" * 400 + "}", '{"x": [[1e308, ' + "1" * 30 + "]]}"]
BROKEN += ['{"torch_autocast": null}', '{"zero_optimization": 1}', '{"fp16": "auto"}']
BROKEN += ['{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}', "\udcff"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_malformed_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"ds\.json"):
        read(str(path))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b'\xef\xbb\xbf{"train_batch_size": 256}')
    assert read(str(path))["train_batch_size"] == 256


def test_a_file_is_read_no_further_than_one_can_be_long(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b" " * (4 << 20) + b"{}")
    with pytest.raises(UserError, match="has more than"):
        read(str(path))


def test_a_missing_file_or_a_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: No such file"):
        parse(["--deepspeed", str(tmp_path / "nowhere.json")])
    with pytest.raises(UserError, match="Is a directory"):
        parse(["--deepspeed", str(tmp_path)])


def test_what_the_file_says_and_no_flag_does_is_done(tmp_path: Path) -> None:
    path = write(tmp_path, {"gradient_clipping": 0.5, "gradient_accumulation_steps": 4})
    config = parse(["--deepspeed", path])
    assert (config.optim.clip_grad, config.run.accumulation_steps) == (0.5, 4)
    got = read(path, clip_norm=0.5, micro_batches=4)
    assert got["train_micro_batch_size_per_gpu"] == 8
    flags = ["--deepspeed", path, "--clip-grad", "2", "--accumulation-steps", "1"]
    config = parse(flags)
    assert (config.optim.clip_grad, config.run.accumulation_steps) == (2.0, 1)
    with pytest.raises(UserError, match=r"gradient_clipping 0\.5 contradicts --clip-grad 2\.0"):
        read(path, clip_norm=config.optim.clip_grad, micro_batches=4)
    auto = write(tmp_path, {"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"})
    config = parse(["--deepspeed", auto])
    assert (config.optim.clip_grad, config.run.accumulation_steps) == (0.0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_clipping", "much"),
        ("gradient_clipping", -1),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 1.5),
        ("gradient_accumulation_steps", True),
    ],
)
def test_numbers_of_the_file_are_numbers(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path, {key: value})
    with pytest.raises(UserError, match=rf"ds\.json: {key} {value!r}: must be a"):
        read(path)
    parse(["--deepspeed", path])  # with the rest of what is wrong, once all is known


def test_what_is_changed_is_said(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100000}
    done = complete(write(tmp_path, {"zero_optimization": zero}))
    assert done.configuration["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    clipping, threshold = done.notes
    assert "gradient_clipping is not said: it is 0 here" in clipping
    assert "persistence_threshold is 0 here, not 100000" in threshold
    content = {"gradient_clipping": "auto", "zero_optimization": {"stage": 3}}
    assert complete(write(tmp_path, content)).notes == []


def test_two_communicators_whose_order_nobody_keeps_do_not_overlap(tmp_path: Path) -> None:
    zero = {"stage": 1, "overlap_comm": True}
    path = write(tmp_path, {"gradient_clipping": 0, "zero_optimization": zero})
    kept = complete(path, overlap=False)
    assert (kept.configuration["zero_optimization"]["overlap_comm"], kept.notes) == (True, [])
    done = complete(path, overlap=False, may_overlap=False)
    assert done.configuration["zero_optimization"]["overlap_comm"] is False
    assert "overlap_comm is false here" in done.notes[0]


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    def notes(content: dict[str, Any], precision: str = "fp16") -> list[str]:
        path = write(tmp_path, {"gradient_clipping": 0, **content})
        return complete(path, precision=precision).notes

    odd = {"enabled": True, "hysteresis": 2, "auto_cast": False, "is_new": 1}
    hysteresis, auto_cast, new = notes({"fp16": odd})
    assert "fp16.hysteresis has no effect: the scale falls after each overflow" in hysteresis
    assert "fp16.auto_cast has no effect" in auto_cast
    assert "fp16.is_new has no effect: it is unknown" in new
    # What is done here anyway, or never would be.
    assert notes({"fp16": {"hysteresis": 1, "auto_cast": True, "loss_scale": 0.0}}) == []
    assert notes({"fp16": {"enabled": "auto", "hysteresis": 2}}, "bf16") == []
    assert notes({"bf16": {"enabled": "auto", "bf16_optimizer_states": True}}, "bf16") != []
    (unknown,) = notes({"of_our_own": 1, "//": "a comment"})
    assert "does not know //, of_our_own" in unknown
    (unknown,) = notes({"data_types": {"xyz": 1}})
    assert "does not know data_types.xyz" in unknown
    offload = {"device": "cpu", "pin_memory": True, "nvme_path": "/x", "buffer_count": "auto"}
    (nvme,) = notes({"zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    assert "offload_optimizer.nvme_path has no effect: nothing is offloaded to a disk" in nvme


def test_what_changes_nothing_is_let_through(tmp_path: Path) -> None:
    harmless = {
        **{"communication_data_type": "fp32", "gradient_predivide_factor": 1.0},
        **{"prescale_gradients": False, "sequence_parallel_size": 1, "gradient_allreduce_op": None},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "zero_quantized_weights": False},
    }
    done = complete(write(tmp_path, harmless | {"gradient_clipping": 0}))
    assert (done.problems, done.notes) == ([], [])


def test_deepspeeds_timer_does_not_wait_for_the_gpu_unless_asked_to(tmp_path: Path) -> None:
    assert read(write(tmp_path, {}))["timers"] == {"throughput": {"enabled": False}}
    asked = {"throughput": {"enabled": True, "synchronized": False}}
    content = {"timers": asked, "steps_per_print": 10, "zero_optimization": {"stage": 1}}
    assert read(write(tmp_path, content))["timers"] == asked
