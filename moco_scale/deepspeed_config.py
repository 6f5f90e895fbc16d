"""A user's DeepSpeed JSON: read, checked against the flags, its ``"auto"`` values filled in.

Plain data in, plain data out: DeepSpeed itself is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def requested_number(path: str, key: str, kind: type[float] | type[int]) -> float | None:
    """A number at the top of a JSON that a flag decides too; None: the JSON leaves it to the flag.

    Args:
        path: the JSON file.
        key: in it.
        kind: float for a number that is not negative, int for a whole one of at least 1.

    Raises:
        UserError: missing or malformed file, or not a number of this kind.
    """
    value = _read(path).get(key, "auto")
    if value == "auto":
        return None
    whole = kind is int
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or value < whole:
        must = "a whole number of at least 1" if whole else "a number, 0 for none"
        raise UserError(f"DeepSpeed configuration {path}: {key} {value!r}: must be {must}")
    return float(value)


@dataclass(frozen=True)
class ReadConfiguration:
    """A DeepSpeed JSON made ready.

    Attributes:
        configuration: what DeepSpeed gets.
        scaling: fp16's loss scale, which is ours.
        notes: lines that say what was changed, and why.
    """

    configuration: dict[str, Any]
    scaling: LossScaling
    notes: list[str]

    @property
    def stage(self) -> int:
        """ZeRO's, 0 to 3."""
        return int(self.configuration["zero_optimization"]["stage"])


def read_configuration(
    path: str,
    *,
    batch_size: int,
    world: int,
    precision: str,
    clip_norm: float,
    parts: int,
    parameters: int,
    overlap: bool,
    compiled: bool,
) -> ReadConfiguration:
    """A DeepSpeed JSON with every ``"auto"`` replaced and every contradiction refused.

    Half precision is not left to DeepSpeed: MoCo casts by itself and scales its loss by itself, so
    that weights, BatchNorm and the average stay fp32 whatever the stage. The sections that ask for
    it are therefore read, checked and taken out; loss scaling is returned beside the rest.

    Args:
        path: the JSON file.
        batch_size: global batch of the run.
        world: number of processes.
        precision: ``--precision``.
        clip_norm: ``--clip-grad``.
        parts: ``--accumulation-steps``.
        parameters: how many numbers are trained; bounds ``"auto"`` bucket sizes.
        overlap: whether gradients may be reduced while backward still runs.
        compiled: ``--compile``.

    Raises:
        UserError: missing or malformed file, a value that contradicts a flag (both are named), or
            something this engine does not do.
    """
    result, notes = _read(path), []
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
        batch_size // world // parts,
        f"--batch-size {batch_size} over {world} processes, --accumulation-steps {parts}",
    )
    source = f"--accumulation-steps {parts}"
    _agree(path, result, "gradient_accumulation_steps", parts, source)
    if "gradient_clipping" not in result and not clip_norm:
        notes.append(
            f"{path} does not say gradient_clipping: it is 0 here, where DeepSpeed would clip at "
            "1.0, because the recipes do not clip"
        )
    _agree(path, result, "gradient_clipping", clip_norm, f"--clip-grad {clip_norm}")
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
    norm = precision == "fp16" or clip_norm > 0
    _zero(path, result, parameters, overlap, norm, notes)
    if compiled and result["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"--compile does not go with stage 3 of {path}, which gathers weights layer by layer "
            "in hooks that cannot be compiled; use --engine fsdp, or a lower stage"
        )
    result.setdefault("steps_per_print", 1_000_000_000)
    return ReadConfiguration(result, scaling, notes)


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


def _zero(
    path: str,
    config: dict[str, Any],
    parameters: int,
    overlap: bool,
    norm: bool,
    notes: list[str],
) -> None:
    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0)
    if stage not in STAGES:
        raise UserError(
            f"DeepSpeed configuration {path}: zero_optimization.stage {stage!r} is not supported; "
            f"use one of {', '.join(map(str, STAGES))}"
        )
    _offload(path, config, zero, stage)
    if stage == 0:
        config["zero_optimization"] = {"stage": 0}
        return
    # Large enough to fill a link, small enough that the first is sent while backward goes on.
    size = min(parameters, max(parameters // 8, 2_000_000), 50_000_000)
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(bucket, "auto") == "auto":
            zero[bucket] = size
    if zero.get("overlap_comm", "auto") == "auto":
        zero["overlap_comm"] = overlap
    if stage == 3:
        _stage3(path, zero, size, notes)
        return
    # The norm costs a device synchronisation, and turns a step whose gradients are not finite into
    # one that is left out: what scaled gradients need, and what must not happen silently else.
    zero["compute_grad_norm"] = norm or "offload_optimizer" in zero  # which DeepSpeed insists on


def _offload(path: str, config: dict[str, Any], zero: dict[str, Any], stage: int) -> None:
    """Optimizer state on the CPU is DeepSpeed's business; weights there are refused."""
    for key in ("cpu_offload", "offload_param"):
        section = zero.get(key)
        target = section.get("device") if isinstance(section, dict) else section
        if target not in ("none", None, False):
            raise UserError(
                f"DeepSpeed configuration {path}: zero_optimization.{key} is not supported; remove "
                'it, or use "offload_optimizer": {"device": "cpu"}'
            )
    section = zero.get("offload_optimizer")
    if section is None:
        return
    if not isinstance(section, dict):
        raise UserError(
            f"DeepSpeed configuration {path}: zero_optimization.offload_optimizer must be an "
            'object such as {"device": "cpu"}'
        )
    target = section.get("device")
    if target in ("none", None):
        del zero["offload_optimizer"]
        return
    if target != "cpu":
        raise UserError(
            f"DeepSpeed configuration {path}: zero_optimization.offload_optimizer to {target!r} is "
            'not supported; use "cpu"'
        )
    if stage == 0:
        raise UserError(
            f"DeepSpeed configuration {path}: offload_optimizer needs zero_optimization.stage 1, 2 "
            "or 3"
        )
    # DeepSpeed has no SGD of its own for the CPU; torch's is a single pass over memory.
    config["zero_force_ds_cpu_optimizer"] = False


def _stage3(path: str, zero: dict[str, Any], size: int, notes: list[str]) -> None:
    # Small parameters that stay gathered would not see the moving average, which works on shards.
    threshold = zero.get("stage3_param_persistence_threshold", "auto")
    if threshold not in ("auto", 0):
        notes.append(
            f"{path}: stage3_param_persistence_threshold is 0 here, not {threshold!r}: small "
            "weights of the key encoder that stay gathered would not follow the query"
        )
    zero["stage3_param_persistence_threshold"] = 0
    # Who chooses this stage is short of memory: weights are let go after use and gathered again for
    # the backward pass. DeepSpeed's own 1e9 would keep any encoder whole from one to the other.
    for key, value in (
        ("stage3_prefetch_bucket_size", size),
        ("stage3_max_live_parameters", 2 * size),
        ("stage3_max_reuse_distance", 0),
    ):
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    # Checkpoints gather weight by weight themselves; DeepSpeed's own saving is not used.
    if zero.get("stage3_gather_16bit_weights_on_model_save", "auto") == "auto":
        zero["stage3_gather_16bit_weights_on_model_save"] = False
