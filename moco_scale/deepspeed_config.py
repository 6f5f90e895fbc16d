"""A user's DeepSpeed JSON: read, checked against the flags, its ``"auto"`` values filled in.

Plain data in, plain data out: DeepSpeed itself is not imported here.
"""

from __future__ import annotations

from typing import Any

from moco_scale.errors import UserError
from moco_scale.files import read_json

STAGES = (0, 1)


def _read(path: str) -> dict[str, Any]:
    given = read_json(path, "DeepSpeed configuration")
    if not isinstance(given, dict):
        raise UserError(f"DeepSpeed configuration {path}: must be a JSON object")
    for name in ("zero_optimization", "torch_autocast", "bf16", "fp16"):
        if not isinstance(given.get(name, {}), dict):
            raise UserError(f"DeepSpeed configuration {path}: {name} must be a JSON object")
    return given


def requested_precision(path: str) -> str:
    """The precision a JSON switches on by itself: ``"bf16"`` or ``"fp32"``.

    Raises:
        UserError: missing or malformed file.
    """
    given = _read(path)
    bf16 = any(_enabled(given.get(name), False) for name in ("bf16", "torch_autocast"))
    return "bf16" if bf16 else "fp32"


def read_configuration(
    path: str, *, batch_size: int, world: int, precision: str, parameters: int, overlap: bool
) -> dict[str, Any]:
    """A DeepSpeed JSON with every ``"auto"`` replaced and every contradiction refused.

    Args:
        path: the JSON file.
        batch_size: global batch of the run.
        world: number of processes.
        precision: ``--precision``.
        parameters: how many numbers are trained; bounds ``"auto"`` bucket sizes.
        overlap: whether gradients may be reduced while backward still runs.

    Raises:
        UserError: missing or malformed file, a value that contradicts a flag (both are named), or
            something this engine does not do.
    """
    result = _read(path)
    _agree(
        path,
        result,
        "train_batch_size",
        batch_size,
        f"--batch-size {batch_size}",
    )
    _agree(
        path,
        result,
        "train_micro_batch_size_per_gpu",
        batch_size // world,
        f"--batch-size {batch_size} over {world} processes",
    )
    _agree(
        path,
        result,
        "gradient_accumulation_steps",
        1,
        "one backward pass per step, which is how this version trains",
    )
    # DeepSpeed's own default is 1.0; the published recipes do not clip.
    _agree(path, result, "gradient_clipping", 0.0, "recipes, which do not clip gradients")
    _agree(path, result, "zero_allow_untested_optimizer", True, "--deepspeed, which runs SGD")
    for key in (
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "amp",
    ):
        if result.get(key):
            raise UserError(
                f"DeepSpeed configuration {path}: {key} changes how gradients are computed or "
                "summed, which must not depend on the engine; remove it"
            )
    for section, instead in (
        ("optimizer", "--momentum, --weight-decay and --base-lr"),
        ("scheduler", "--lr-scheduler"),
    ):
        if section in result:
            raise UserError(
                f"DeepSpeed configuration {path}: its {section!r} section contradicts "
                f"{instead}, which decide here; remove the section"
            )
    _precision(path, result, precision)
    _zero(path, result, parameters, overlap)
    result.setdefault("steps_per_print", 1_000_000_000)
    return result


def _agree(path: str, section: dict[str, Any], key: str, value: Any, source: str) -> None:
    if section.get(key, "auto") not in ("auto", value):
        raise UserError(
            f"DeepSpeed configuration {path}: {key} {section[key]!r} contradicts {source} "
            f'({key} {value}); set it to "auto" or change the flag'
        )
    section[key] = value


def _precision(path: str, config: dict[str, Any], precision: str) -> None:
    """bf16 is done by torch_autocast: weights stay fp32, and so do BatchNorm and the average."""
    half = precision == "bf16"
    if _enabled(config.pop("fp16", None), False):
        raise UserError(
            f"DeepSpeed configuration {path}: fp16 is enabled but --precision is {precision}; "
            "this version trains in fp32 or bf16"
        )
    bf16 = config.pop("bf16", None)
    autocast = config.get("torch_autocast", {})
    for name, section in (("bf16", bf16), ("torch_autocast", autocast)):
        if _enabled(section, half) != half and section:
            state = "enabled" if not half else "disabled"
            raise UserError(
                f"DeepSpeed configuration {path}: {name} is {state} but --precision is "
                f'{precision}; set "enabled": "auto" there or pass --precision '
                f"{'fp32' if half else 'bf16'}"
            )
    dtype = autocast.get("dtype", "auto")
    if half and dtype not in ("auto", "bfloat16", "bf16", "torch.bfloat16"):
        raise UserError(
            f"DeepSpeed configuration {path}: torch_autocast.dtype {dtype!r} contradicts "
            f"--precision {precision}"
        )
    if autocast.get("lower_precision_safe_modules"):
        raise UserError(
            f"DeepSpeed configuration {path}: torch_autocast.lower_precision_safe_modules would "
            "sum these modules' gradients in half precision; remove it"
        )
    config["torch_autocast"] = {
        "enabled": half,
        "dtype": "bfloat16",
        # Gradients are summed over ranks in fp32, as every other engine does it.
        "lower_precision_safe_modules": [],
    }


def _enabled(section: dict[str, Any] | None, automatic: bool) -> bool:
    value = (section or {}).get("enabled", "auto" if section else False)
    return automatic if value == "auto" else bool(value)


def _zero(path: str, config: dict[str, Any], parameters: int, overlap: bool) -> None:
    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0)
    if stage not in STAGES:
        raise UserError(
            f"DeepSpeed configuration {path}: zero_optimization.stage {stage!r} is not supported; "
            f"use one of {', '.join(map(str, STAGES))}"
        )
    if zero.get("cpu_offload"):
        raise UserError(
            f"DeepSpeed configuration {path}: zero_optimization.cpu_offload is not supported; "
            "remove it"
        )
    for offload in ("offload_optimizer", "offload_param"):
        section = zero.get(offload)
        target = section.get("device") if isinstance(section, dict) else section
        if target not in ("none", None):
            raise UserError(
                f"DeepSpeed configuration {path}: zero_optimization.{offload} is not supported; "
                "remove it"
            )
    if stage == 0:
        config["zero_optimization"] = {"stage": 0}
        return
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(bucket, "auto") == "auto":
            zero[bucket] = min(50_000_000, parameters)
    if zero.get("overlap_comm", "auto") == "auto":
        zero["overlap_comm"] = overlap
    # The norm is only needed for clipping, costs a device synchronisation, and turns a step whose
    # gradients are not finite into one that is silently left out.
    zero["compute_grad_norm"] = False
