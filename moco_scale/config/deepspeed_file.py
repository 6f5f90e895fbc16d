"""DeepSpeed JSON of the user: read, checked against the flags, its ``"auto"`` values filled in.

Plain data in, plain data out: DeepSpeed itself is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moco_scale.config.deepspeed_keys import take_keys, take_other_stages, take_reports
from moco_scale.config.deepspeed_precision import HALF_NAMES, is_enabled, take_precision
from moco_scale.optim.loss_scale import LossScaling
from moco_scale.untrusted.deepspeed_file import (
    AUTO,
    WHAT,
    read_deepspeed_file,
    remove,
    shown,
    wrong_types,
)
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable


def _read(path: str) -> tuple[dict[str, Any], list[str]]:
    """Read the values of right types, and the problems of the others.

    Raises:
        UserError: The file is missing or malformed.
    """
    given = read_deepspeed_file(path)
    wrong = wrong_types(given)
    for place in wrong:
        remove(given, place)
    return given, list(wrong.values())


def requested_precision(path: str) -> str:
    """Return the precision that a JSON asks for: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Other problems of the file are reported by :func:`look_through`.

    Raises:
        UserError: The file is missing or malformed.
    """
    given, _ = _read(path)
    if is_enabled(given.get("fp16"), False):
        return "fp16"
    if is_enabled(given.get("torch_autocast"), False):
        dtype = given["torch_autocast"].get("dtype", AUTO)
        return "fp16" if dtype != AUTO and dtype in HALF_NAMES["fp16"] else "bf16"
    return "bf16" if is_enabled(given.get("bf16"), False) else "fp32"


def requested_number(path: str, key: str) -> float | None:
    """Return a top-level number that is also a flag; None: it is left to the flag.

    Raises:
        UserError: The file is missing or malformed.
    """
    value = _read(path)[0].get(key)
    return None if value in (AUTO, None) else float(value)


@dataclass(frozen=True)
class ReadConfiguration:
    """Checked DeepSpeed JSON.

    Attributes:
        configuration: for DeepSpeed.
        scaling: fp16's loss scale, which is ours.
        notes: lines about changes and keys without effect, with reasons.
        problems: lines about values that must be corrected first; then the rest is void.
    """

    configuration: dict[str, Any]
    scaling: LossScaling
    notes: list[str]
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> int:
        """Stage of ZeRO, 0 to 3."""
        return int(self.configuration["zero_optimization"]["stage"])


def refuse(path: str, problems: list[str]) -> None:
    """Raise a UserError with all problems of a file, if there are any."""
    if not problems:
        return
    start = f"{WHAT} {printable(path)}:"
    if len(problems) == 1:
        raise UserError(f"{start} {problems[0]}")
    raise UserError("\n  ".join([start, *problems]))


def look_through(
    path: str,
    *,
    batch_size: int,
    world: int,
    precision: str,
    clip_norm: float,
    micro_batches: int,
    parameters: int,
    overlap: bool,
    compiled: bool,
    may_overlap: bool = True,
    batch_flag: str = "",
) -> ReadConfiguration:
    """Read a DeepSpeed JSON, replace every ``"auto"`` and find every contradiction.

    Half precision is not left to DeepSpeed: MoCo casts by itself and scales its loss by itself, so
    that weights, BatchNorm and the average stay fp32 in every stage. The sections that ask for it
    are therefore read, checked and removed; loss scaling is returned beside the rest.

    Args:
        path: the JSON file.
        batch_size: global batch of the run.
        world: number of processes.
        precision: ``--precision``.
        clip_norm: ``--clip-grad``.
        micro_batches: ``--accumulation-steps``.
        parameters: trained numbers; bounds bucket sizes.
        overlap: default of reducing gradients during backward.
        compiled: ``--compile``.
        may_overlap: False: overlap is refused, as processes might deadlock.
        batch_flag: name of the batch in messages; by default the flag and its value.

    Raises:
        UserError: The file is missing or malformed.
    """
    batch_flag = batch_flag or f"--batch-size {batch_size}"
    result, problems = _read(path)
    notes: list[str] = []
    for section, instead in (
        ("optimizer", "--momentum, --weight-decay and --base-lr"),
        ("scheduler", "--lr-scheduler"),
    ):
        if result.pop(section, None):
            problems.append(
                f"its {section!r} section contradicts {instead}, which decide here; remove the "
                "section"
            )
    take_keys(result, problems, notes)
    if result.get("gradient_clipping") is None and not clip_norm:
        notes.append(
            "gradient_clipping is not said: it is 0 here, where DeepSpeed would clip at 1.0, "
            "because the recipes do not clip"
        )
    micro = batch_size // world // micro_batches
    for key, value, source in (
        ("train_batch_size", batch_size, batch_flag),
        (
            "train_micro_batch_size_per_gpu",
            micro,
            f"{batch_flag} over {world} processes, --accumulation-steps {micro_batches}",
        ),
        ("gradient_accumulation_steps", micro_batches, f"--accumulation-steps {micro_batches}"),
        ("gradient_clipping", clip_norm, f"--clip-grad {clip_norm}"),
        ("zero_allow_untested_optimizer", True, "--deepspeed, which runs SGD"),
    ):
        if result.get(key) not in (AUTO, None, value):
            problems.append(
                f"{key} {shown(result[key])} contradicts {source} ({key} {value}); set it to "
                '"auto" or change the flag'
            )
        result[key] = value
    scaling = take_precision(result, precision, problems, notes)
    zero = result.setdefault("zero_optimization", {})
    stage = zero["stage"] = zero.get("stage") or 0
    take_reports(result, stage, problems, notes)
    _offload(result, zero, stage, problems)
    if not may_overlap and zero.get("overlap_comm") is True:
        zero["overlap_comm"] = False
        notes.append(
            "overlap_comm is false here: BatchNorm groups that span processes talk at the same "
            "time, and NCCL does not keep the order of the two (NCCL_LAUNCH_ORDER_IMPLICIT)"
        )
    take_other_stages(zero, stage, notes)
    if stage > 0:
        _zero(zero, parameters, overlap, precision == "fp16" or clip_norm > 0, notes)
    if compiled and stage == 3:
        problems.append(
            "--compile does not go with stage 3, which gathers weights layer by layer in hooks "
            "that cannot be compiled; use --engine fsdp, or a lower stage"
        )
    # DeepSpeed's own images per second would make the host wait for the GPU twice a step.
    result.setdefault("timers", {"throughput": {"enabled": False}})
    notes = [f"{printable(path)}: {note}" for note in notes]
    return ReadConfiguration(result, scaling, notes, problems)


def _zero(
    zero: dict[str, Any], parameters: int, overlap: bool, norm: bool, notes: list[str]
) -> None:
    """Fill in the section of a stage from 1 on."""
    # Large enough to fill a link, small enough that the first is sent while backward goes on.
    size = min(parameters, max(parameters // 8, 2_000_000), 50_000_000)
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        wish = zero.get(bucket)
        # More than there is would only take memory: DeepSpeed makes buffers of this size.
        zero[bucket] = size if wish in (AUTO, None) else max(1, min(int(wish), parameters))
    if zero.get("overlap_comm") in (AUTO, None):
        zero["overlap_comm"] = overlap
    for key in [key for key, value in zero.items() if value == AUTO]:
        if key not in _STAGE_3_DEFAULTS:
            del zero[key]  # DeepSpeed's own
    if zero["stage"] == 3:
        _stage3(zero, size, notes)
        return
    # The norm costs a device synchronisation, and turns a step whose gradients are not finite into
    # one that is left out: what scaled gradients need, and what must not happen silently else.
    norm = norm or "offload_optimizer" in zero  # which DeepSpeed insists on
    if zero.get("compute_grad_norm") not in (None, norm):
        notes.append(
            f"zero_optimization.compute_grad_norm is {str(norm).lower()} here: a step is left out "
            "by its norm with fp16, --clip-grad or offloading, and counted (--max-nonfinite) else"
        )
    zero["compute_grad_norm"] = norm


def _offload(config: dict[str, Any], zero: dict[str, Any], stage: int, problems: list[str]) -> None:
    """Allow the optimizer state on the CPU; refuse weights there."""
    for key in ("cpu_offload", "cpu_offload_param", "offload_param"):
        section = zero.pop(key, None)
        target = section.get("device") if isinstance(section, dict) else section
        if target not in ("none", None, False):
            problems.append(
                f"zero_optimization.{key} is not supported; remove it, or use "
                '"offload_optimizer": {"device": "cpu"}'
            )
    section = zero.get("offload_optimizer")
    target = (section or {}).get("device")
    if target in ("none", None):
        zero.pop("offload_optimizer", None)
    elif target != "cpu":
        del zero["offload_optimizer"]
        problems.append(
            f'zero_optimization.offload_optimizer to {shown(target)} is not supported; use "cpu"'
        )
    elif stage == 0:
        del zero["offload_optimizer"]
        problems.append("offload_optimizer needs zero_optimization.stage 1, 2 or 3")
    else:
        # DeepSpeed has no SGD of its own for the CPU; torch's is a single pass over memory.
        config["zero_force_ds_cpu_optimizer"] = False


_STAGE_3_DEFAULTS = (
    *("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
)


def _stage3(zero: dict[str, Any], size: int, notes: list[str]) -> None:
    # Small parameters that stay gathered would not see the moving average, which works on shards.
    persistence, prefetch, live, reuse = _STAGE_3_DEFAULTS
    threshold = zero.get(persistence)
    if threshold not in (AUTO, 0, None):
        notes.append(
            f"{persistence} is 0 here, not {shown(threshold)}: small weights of the key encoder "
            "that stay gathered would not follow the query"
        )
    zero[persistence] = 0
    # Who chooses this stage is short of memory: weights are let go after use and gathered again for
    # the backward pass. DeepSpeed's own 1e9 would keep any encoder whole from one to the other.
    for key, value in ((prefetch, size), (live, 2 * size), (reuse, 0)):
        if zero.get(key) in (AUTO, None):
            zero[key] = value
