"""A user's DeepSpeed JSON: read, checked against the flags, its ``"auto"`` values filled in.

Plain data in, plain data out: DeepSpeed itself is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moco_scale.deepspeed_keys import check_keys
from moco_scale.deepspeed_precision import (
    HALF_NAMES,
    check_sections,
    is_enabled,
    take_precision,
)
from moco_scale.errors import UserError
from moco_scale.files import read_json
from moco_scale.loss_scale import LossScaling

STAGES = (0, 1, 2, 3)


def _read(path: str) -> dict[str, Any]:
    given = read_json(path, "DeepSpeed configuration")
    if not isinstance(given, dict):
        raise UserError(f"DeepSpeed configuration {path}: must be a JSON object")
    if not isinstance(given.get("zero_optimization", {}), dict):
        raise UserError(f"DeepSpeed configuration {path}: zero_optimization must be a JSON object")
    check_sections(path, given)
    return given


def requested_precision(path: str) -> str:
    """The precision a JSON switches on by itself: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Raises:
        UserError: missing or malformed file.
    """
    given = _read(path)
    if is_enabled(given.get("fp16"), False):
        return "fp16"
    if is_enabled(given.get("torch_autocast"), False):
        dtype = given["torch_autocast"].get("dtype", "auto")
        return "fp16" if dtype != "auto" and dtype in HALF_NAMES["fp16"] else "bf16"
    return "bf16" if is_enabled(given.get("bf16"), False) else "fp32"


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
    may_overlap: bool = True,
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
        overlap: whether gradients are reduced while backward still runs, where it does not say.
        compiled: ``--compile``.
        may_overlap: False: they must not be, or processes might wait for each other for ever.

    Raises:
        UserError: missing or malformed file, a value that contradicts a flag (both are named), or
            something this engine does not do.
    """
    result = _read(path)
    notes = check_keys(path, result)
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
    for section, instead in (
        ("optimizer", "--momentum, --weight-decay and --base-lr"),
        ("scheduler", "--lr-scheduler"),
    ):
        if section in result:
            raise UserError(
                f"DeepSpeed configuration {path}: its {section!r} section contradicts "
                f"{instead}, which decide here; remove the section"
            )
    scaling = take_precision(path, result, precision, notes)
    norm = precision == "fp16" or clip_norm > 0
    zero = result.get("zero_optimization", {})
    if not may_overlap and zero.get("overlap_comm") is True:
        zero["overlap_comm"] = False
        notes.append(
            f"{path}: overlap_comm is false here: BatchNorm groups that span processes talk at the "
            "same time, and NCCL does not keep the order of the two (NCCL_LAUNCH_ORDER_IMPLICIT)"
        )
    _zero(path, result, parameters, overlap, norm, notes)
    if compiled and result["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"--compile does not go with stage 3 of {path}, which gathers weights layer by layer "
            "in hooks that cannot be compiled; use --engine fsdp, or a lower stage"
        )
    result.setdefault("steps_per_print", 1_000_000_000)
    _timers(path, result)
    return ReadConfiguration(result, scaling, notes)


def _agree(path: str, section: dict[str, Any], key: str, value: Any, source: str) -> None:
    if section.get(key, "auto") not in ("auto", value):
        raise UserError(
            f"DeepSpeed configuration {path}: {key} {section[key]!r} contradicts {source} "
            f'({key} {value}); set it to "auto" or change the flag'
        )
    section[key] = value


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
    if type(stage) is not int or stage not in STAGES:  # true would be 1
        raise UserError(
            f"DeepSpeed configuration {path}: zero_optimization.stage {stage!r} is not supported; "
            f"use one of {', '.join(map(str, STAGES))}"
        )
    _offload(path, config, zero, stage)
    if stage == 0:
        # The rest has no effect, but DeepSpeed still tells a misspelt key.
        config["zero_optimization"] = {k: v for k, v in zero.items() if v != "auto"}
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


def _timers(path: str, config: dict[str, Any]) -> None:
    """DeepSpeed's own images per second would make the host wait for the GPU twice a step."""
    timers = config.setdefault("timers", {})
    if not isinstance(timers, dict) or not isinstance(timers.get("throughput", {}), dict):
        raise UserError(
            f"DeepSpeed configuration {path}: timers must be a JSON object such as "
            '{"throughput": {"enabled": true}}'
        )
    timers.setdefault("throughput", {"enabled": False})


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
