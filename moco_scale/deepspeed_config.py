"""A user's DeepSpeed JSON: read, checked against the flags, its ``"auto"`` values filled in.

Plain data in, plain data out: DeepSpeed itself is not imported here.
"""

from __future__ import annotations

from typing import Any

from moco_scale.errors import UserError
from moco_scale.files import read_json
from moco_scale.loss_scale import LossScaling

STAGES = (0, 1, 2, 3)
SECTIONS = {"bf16": ("bf16",), "fp16": ("fp16",), "torch_autocast": ("bf16", "fp16")}
"""Sections that switch on a half precision, and which."""
HALF_NAMES = {
    "bf16": ("auto", "bf16", "bfloat16", "torch.bfloat16"),
    "fp16": ("auto", "fp16", "float16", "torch.float16", "half"),
}


def _read(path: str) -> dict[str, Any]:
    given = read_json(path, "DeepSpeed configuration")
    if not isinstance(given, dict):
        raise UserError(f"DeepSpeed configuration {path}: must be a JSON object")
    for name in ("zero_optimization", "torch_autocast", "bf16", "fp16"):
        if not isinstance(given.get(name, {}), dict):
            raise UserError(f"DeepSpeed configuration {path}: {name} must be a JSON object")
    return given


def requested_precision(path: str) -> str:
    """The precision a JSON switches on by itself: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Raises:
        UserError: missing or malformed file.
    """
    given = _read(path)
    if _enabled(given.get("fp16"), False):
        return "fp16"
    if _enabled(given.get("torch_autocast"), False):
        dtype = given["torch_autocast"].get("dtype", "auto")
        return "fp16" if dtype != "auto" and dtype in HALF_NAMES["fp16"] else "bf16"
    return "bf16" if _enabled(given.get("bf16"), False) else "fp32"


def read_configuration(
    path: str, *, batch_size: int, world: int, precision: str, parameters: int, overlap: bool
) -> tuple[dict[str, Any], LossScaling]:
    """A DeepSpeed JSON with every ``"auto"`` replaced and every contradiction refused.

    Half precision is not left to DeepSpeed: MoCo casts by itself and scales its loss by itself, so
    that weights, BatchNorm and the average stay fp32 whatever the stage. The sections that ask for
    it are therefore read, checked and taken out; loss scaling is returned beside the rest.

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
    scaling = _precision(path, result, precision)
    _zero(path, result, parameters, overlap, norm=precision == "fp16")
    result.setdefault("steps_per_print", 1_000_000_000)
    return result, scaling


def _agree(path: str, section: dict[str, Any], key: str, value: Any, source: str) -> None:
    if section.get(key, "auto") not in ("auto", value):
        raise UserError(
            f"DeepSpeed configuration {path}: {key} {section[key]!r} contradicts {source} "
            f'({key} {value}); set it to "auto" or change the flag'
        )
    section[key] = value


def _precision(path: str, config: dict[str, Any], precision: str) -> LossScaling:
    """Check what the sections say against ``--precision`` and take them out."""
    scaling = LossScaling()
    for name, meant in SECTIONS.items():
        section = config.pop(name, None)
        wanted = precision in meant
        if section and _enabled(section, wanted) != wanted:
            state, instead = ("disabled", "fp32") if wanted else ("enabled", meant[0])
            raise UserError(
                f"DeepSpeed configuration {path}: {name} is {state} but --precision is "
                f'{precision}; set "enabled": "auto" there or pass --precision {instead}'
            )
        if section and wanted and name == "fp16":
            scaling = _loss_scaling(path, section)
        if section and wanted and name == "torch_autocast":
            dtype = section.get("dtype", "auto")
            if dtype not in HALF_NAMES[precision]:
                raise UserError(
                    f"DeepSpeed configuration {path}: torch_autocast.dtype {dtype!r} contradicts "
                    f"--precision {precision}"
                )
        if section and section.get("lower_precision_safe_modules"):
            raise UserError(
                f"DeepSpeed configuration {path}: torch_autocast.lower_precision_safe_modules "
                "would sum these modules' gradients in half precision; remove it"
            )
    return scaling


def _loss_scaling(path: str, section: dict[str, Any]) -> LossScaling:
    """The dynamic loss scaling of an ``fp16`` section; ``"auto"`` means our default."""
    if section.get("loss_scale", 0) not in (0, "auto"):
        raise UserError(
            f"DeepSpeed configuration {path}: fp16.loss_scale {section['loss_scale']!r} is a fixed "
            "scale; set it to 0, which adapts it"
        )
    default = LossScaling()
    values = {}
    for key, usual in (
        ("initial_scale_power", 16),
        ("loss_scale_window", default.window),
        ("min_loss_scale", default.minimum),
    ):
        value = section.get(key, "auto")
        if value == "auto":
            value = usual
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(
                f"DeepSpeed configuration {path}: fp16.{key} {value!r}: must be a number, not "
                "negative"
            )
        values[key] = value
    return LossScaling(
        initial=2.0 ** values["initial_scale_power"],
        window=max(1, int(values["loss_scale_window"])),
        minimum=float(values["min_loss_scale"]),
    )


def _enabled(section: dict[str, Any] | None, automatic: bool) -> bool:
    value = (section or {}).get("enabled", "auto" if section else False)
    return automatic if value == "auto" else bool(value)


def _zero(path: str, config: dict[str, Any], parameters: int, overlap: bool, norm: bool) -> None:
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
    if stage == 3:
        _stage3(path, zero, parameters)
        return
    # The norm costs a device synchronisation, and turns a step whose gradients are not finite into
    # one that is left out: what scaled gradients need, and what must not happen silently else.
    zero["compute_grad_norm"] = norm


def _stage3(path: str, zero: dict[str, Any], parameters: int) -> None:
    # Small parameters that stay gathered would not see the moving average, which works on shards.
    threshold = zero.get("stage3_param_persistence_threshold", "auto")
    if threshold not in ("auto", 0):
        raise UserError(
            f"DeepSpeed configuration {path}: stage3_param_persistence_threshold {threshold!r} "
            "would keep small weights of the key encoder from following the query; set it to 0"
        )
    zero["stage3_param_persistence_threshold"] = 0
    if zero.get("stage3_prefetch_bucket_size", "auto") == "auto":
        zero["stage3_prefetch_bucket_size"] = min(50_000_000, parameters)
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        if zero.get(key, "auto") == "auto":
            zero[key] = 1_000_000_000
    # Checkpoints gather weight by weight themselves; DeepSpeed's own saving is not used.
    if zero.get("stage3_gather_16bit_weights_on_model_save", "auto") == "auto":
        zero["stage3_gather_16bit_weights_on_model_save"] = False
