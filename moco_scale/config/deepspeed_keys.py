"""Keys of a DeepSpeed JSON that are refused, have no effect, or change results."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moco_scale.untrusted.deepspeed_file import AUTO
from moco_scale.utils.text import printable

KNOWN = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 checkpoint comet comms_logger
    communication_data_type compile compression_training csv_monitor curriculum_learning
    data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    graph_harvesting hybrid_engine log_level managed_gradient_accumulation memory_breakdown nebula
    optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
    seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wandb
    wall_clock_breakdown weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()  # noqa: SIM905
)
"""Top-level keys that DeepSpeed 0.19 reads, or refuses by name."""

_SUMS = "gradients would be summed otherwise than under other engines"
_OTHER_RUN = "another model, or other batches, would be trained"
_HALF = "weights or gradients would be rounded or late"
_WHOLE_MODULES = "modules that are gathered whole fail when a step goes through them twice"
# Keys that change what is computed or summed: values that do not, and what would be.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "communication_data_type": (("fp32",), _SUMS),
    "seq_parallel_communication_data_type": (("fp32",), _SUMS),
    "gradient_allreduce_op": (("mean",), _SUMS),
    "prescale_gradients": ((), _SUMS),
    "gradient_predivide_factor": ((1,), _SUMS),
    "disable_allgather": ((), _SUMS),
    "managed_gradient_accumulation": ((True,), _SUMS),
    "amp": ((), "--precision decides"),
    "sequence_parallel_size": ((1,), _OTHER_RUN),
    "tensor_parallel": (({"autotp_size": 0}, {"autotp_size": 1}), _OTHER_RUN),
    "expert_parallel": ((), _OTHER_RUN),
    "weight_quantization": ((), _OTHER_RUN),
    "data_efficiency": ((), _OTHER_RUN),
    "hybrid_engine": ((), _OTHER_RUN),
    "curriculum_learning": ((), _OTHER_RUN),
    "progressive_layer_drop": ((), _OTHER_RUN),
    "compression_training": ((), _OTHER_RUN),
    "quantize_training": ((), _OTHER_RUN),
    "sparse_attention": ((), _OTHER_RUN),
    "data_types.grad_accum_dtype": (("fp32",), _SUMS),
    "data_types.param_dtype": (("fp32",), _HALF),
    "data_types.buffer_dtype": (("fp32",), _HALF),
    "zero_optimization.zero_quantized_weights": ((), _HALF),
    "zero_optimization.zero_quantized_nontrainable_weights": ((), _HALF),
    "zero_optimization.zero_quantized_gradients": ((), _HALF),
    "zero_optimization.zeropp_loco_param": ((), _HALF),
    "zero_optimization.zero_hpz_partition_size": (
        (1,),
        "its second copy of the key encoder would not follow the moving average",
    ),
    "zero_optimization.mics_shard_size": ((-1,), "--engine fsdp --fsdp-shard-size N does this"),
    "zero_optimization.mics_hierarchical_params_gather": ((), _SUMS),
    "zero_optimization.zenflow": ((), _HALF),
    "zero_optimization.leaf_module": ((), _WHOLE_MODULES),
    "zero_optimization.stage3_module_granularity_threshold": ((0, AUTO), _WHOLE_MODULES),
    "zero_optimization.module_granularity_threshold": ((0, AUTO), _WHOLE_MODULES),
    "zero_optimization.offload_optimizer.ratio": (
        (1, AUTO),
        "what stays on the GPU would be trained by AdamW instead of SGD",
    ),
    "zero_optimization.offload_optimizer.super_offload": ((), "it is for Adam, not for SGD"),
}
_EMPTY_IS_ON = ("zero_optimization.zenflow",)
_OWN_CHECKPOINTS = "checkpoints are not DeepSpeed's here (--checkpoint-freq, --save-freq, --resume)"
_OWN_DATA = "images are not read by DeepSpeed here (--data-dir, --num-workers)"
_ONE_DENSE_MODEL = "no model here has such parts"
# Keys that nothing here asks for: values that ask for nothing, and what does it instead.
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing": ((), "--activation-checkpointing does this"),
    "aio": ((), "nothing is offloaded to a disk"),
    "autotuning": ((), "`python -m moco_scale plan` says what fits"),
    "checkpoint": ((), _OWN_CHECKPOINTS),
    "compile": ((), "--compile does this"),
    "datastates_ckpt": ((), _OWN_CHECKPOINTS),
    "dataloader_drop_last": ((), _OWN_DATA),
    "dump_state": ((), "OUT/config.json has every setting"),
    "eigenvalue": ((), "it is for quantised training"),
    "elasticity": ((), "--batch-size is global, and any number of processes goes on with a run"),
    "graph_harvesting": ((), "--compile is what makes kernels fewer"),
    "nebula": ((), _OWN_CHECKPOINTS),
    "pipeline": ((), "no model here is split into stages"),
    "sparse_gradients": ((), _ONE_DENSE_MODEL),
    "use_data_before_expert_parallelism": ((), _ONE_DENSE_MODEL),
    "vocabulary_size": ((), _ONE_DENSE_MODEL),
    "zero_force_ds_cpu_optimizer": ((AUTO,), "SGD is torch's"),
    "data_types.keep_in_fp32_modules": (("auto",), "all weights are fp32 here"),
    "zero_optimization.cpu_offload_use_pin_memory": ((), 'say it in "offload_optimizer"'),
    "zero_optimization.load_from_fp32_weights": ((True,), _OWN_CHECKPOINTS),
    "zero_optimization.elastic_checkpoint": ((), _OWN_CHECKPOINTS),
    "zero_optimization.pipeline_loading_checkpoint": ((), _OWN_CHECKPOINTS),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": ((AUTO,), _OWN_CHECKPOINTS),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": ((AUTO,), _OWN_CHECKPOINTS),
    "zero_optimization.gather_16bit_weights_on_model_save": ((AUTO,), _OWN_CHECKPOINTS),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ((), "the optimizer is SGD"),
    **dict.fromkeys(
        (
            f"zero_optimization.offload_optimizer.{key}"
            for key in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")
        ),
        ((AUTO,), "nothing is offloaded to a disk"),
    ),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": ((AUTO,), "SGD is torch's"),
    "zero_optimization.allgather_partitions": ((True, AUTO), "DeepSpeed 0.19 does not read it"),
}
# Of sections whose keys DeepSpeed itself does not check.
_INSIDE = {
    "flops_profiler": {
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules"),
        *("detailed", "output_file"),
    },
    "timers": {"throughput"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
}
MONITORS = {
    "tensorboard": "tensorboard",
    "csv_monitor": "",
    "wandb": "wandb",
    "comet": "comet_ml",
}
"""Sections that send figures of a run somewhere, and the package that each needs."""
_PLACES = (("tensorboard", "output_path"), ("csv_monitor", "output_path"))
_FILES = (("flops_profiler", "output_file"),)
_INSTEAD = "OUT/metrics.jsonl and OUT/tensorboard have this run's figures"
# What DeepSpeed reports after a step of its own, which stage 0 does not have.
_REPORTS = {
    **dict.fromkeys(MONITORS, _INSTEAD),
    "flops_profiler": "the log says FLOPs (MFU); `python -m moco_scale flops` counts them",
    "wall_clock_breakdown": "OUT/metrics.jsonl has the time of each phase",
    "steps_per_print": "--print-freq",
    "timers": "the log says images/s",
}
_STAGE_3_ONLY = frozenset(
    """
    prefetch_bucket_size param_persistence_threshold model_persistence_threshold
    max_live_parameters max_reuse_distance
    use_all_reduce_for_fetch_params allgather_sequential sub_group_size
    """.split()  # noqa: SIM905
)
_OLD_NAMES = {"bfloat16": "bf16"}


def misspelt(given: Iterable[str], known: Iterable[str], place: str = "") -> dict[str, str]:
    """Find keys that DeepSpeed does not know and that look like one it does.

    Args:
        given: keys of a file.
        known: DeepSpeed's keys.
        place: of both in the file, with a dot at its end; at the top by default.

    Returns:
        The likely meaning of each, by key.
    """
    known = set(known)
    found = {}
    for key in given:
        if key in known:
            continue
        meant = _OLD_NAMES.get(key) or next(
            iter(difflib.get_close_matches(key[:100], known, 1, 0.75)), ""
        )
        if meant:
            found[key] = f"{place}{printable(key, 60)} is unknown; do you mean {meant}?"
    return found


def is_off(value: Any) -> bool:
    """Tell whether a value asks for nothing, whatever its key."""
    return not value or (isinstance(value, dict) and value.get("enabled") is False)


def take_keys(config: dict[str, Any], problems: list[str], notes: list[str]) -> None:
    """Report and remove keys that are misspelt, change results or have no effect.

    Args:
        config: content of a file, of the right types.
        problems: gets a line for each refused key.
        notes: gets a line for each key, or set of keys, without effect.
    """
    _take_unknown(config, KNOWN, "", problems, notes)
    for section, known in _INSIDE.items():
        _take_unknown(config.get(section) or {}, known, f"{section}.", problems, notes)
    for place, (harmless, why) in _REFUSED.items():
        holder, key = _find(config, place)
        if holder is not None:
            value = holder.pop(key)
            switches_on = value == {} and place in _EMPTY_IS_ON
            if switches_on or not _asks_for_nothing(value, harmless):
                problems.append(f"{place} is not done here: {why}; remove it")
    for place, (harmless, instead) in _WITHOUT_EFFECT.items():
        holder, key = _find(config, place)
        if holder is not None:
            value = holder.pop(key)
            if not _asks_for_nothing(value, harmless):
                notes.append(f"{place} has no effect: {instead}")


def _take_unknown(
    section: dict[str, Any], known: Iterable[str], place: str, problems: list[str], notes: list[str]
) -> None:
    known = set(known)
    wrong = misspelt(list(section), known, place)
    problems += wrong.values()
    unknown = sorted(section.keys() - known - wrong.keys())
    for key in (*wrong, *unknown):
        del section[key]
    if unknown:
        names = ", ".join(place + printable(key, 60) for key in unknown)
        notes.append(f"DeepSpeed does not know {names}: without effect")


def take_reports(config: dict[str, Any], stage: int, problems: list[str], notes: list[str]) -> None:
    """Remove reports that DeepSpeed cannot write here, with a line for each.

    Args:
        config: content of a file, of the right types.
        stage: ZeRO's.
        problems: gets a line for each missing package.
        notes: gets a line for each key without effect.
    """
    for name, package in MONITORS.items():
        if (config.get(name) or {}).get("enabled") and not _is_installed(package):
            problems.append(
                f"{name} needs a package that is not installed: `pip install {package}`, or remove "
                f"the section ({_INSTEAD})"
            )
            del config[name]
    for name, instead in _REPORTS.items():
        value = config.get(name)
        if name == "timers":
            value = (value or {}).get("throughput")
        if is_off(value) or value == AUTO:
            config.pop(name, None)
        elif isinstance(value, dict) and not value.get("enabled"):
            config.pop(name)
            notes.append(f'{name} has no effect without "enabled": true')
        elif stage == 0:
            config.pop(name)
            notes.append(
                f"{name} has no effect at stage 0, whose steps are not DeepSpeed's: {instead}"
            )
    if "timers" in config and "steps_per_print" not in config:
        del config["timers"]
        notes.append("timers.throughput has no effect without steps_per_print, which says when")
    comms = config.get("comms_logger")
    if is_off(comms):
        config.pop("comms_logger", None)  # even one that is false would switch it on
    elif not (comms and comms.get("enabled") and comms.get("verbose")):
        del config["comms_logger"]
        notes.append(
            'comms_logger has no effect without "enabled": true and "verbose": true: nothing here '
            "asks for its summary; `python -m moco_scale plan` says what a step sends"
        )


def unwritable_reports(config: dict[str, Any]) -> list[str]:
    """Return a line for each place of a report that is not writable on this machine.

    Only the first rank writes them. Nothing is made: preflight asks too.

    Args:
        config: content of a file, after :func:`take_reports`.
    """
    lines = []
    for section, key in (*_PLACES, *_FILES):
        place = (config.get(section) or {}).get(key)
        if not isinstance(place, str) or not place:
            continue
        path = Path(place).absolute()
        if (section, key) in _FILES:
            if path.is_dir():
                lines.append(f"{section}.{key} {printable(place)}: is a folder; name a file")
            path = path.parent
        # What is missing is made, in the nearest folder that is there.
        there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK) or _of_kernel(there):
            lines.append(
                f"{section}.{key} {printable(place)}: nothing can be written in "
                f"{printable(there)}; name another place, or remove the section"
            )
    return lines


def _of_kernel(folder: Path) -> bool:
    """Tell whether nobody can make anything there, whatever its permissions."""
    return any(folder.is_relative_to(root) for root in ("/proc", "/sys"))


def reports_by_log(config: dict[str, Any]) -> bool:
    """Tell whether a file's report goes through DeepSpeed's log, which is muted otherwise."""
    return bool({"steps_per_print", "comms_logger"} & config.keys())


def take_other_stages(zero: dict[str, Any], stage: int, notes: list[str]) -> None:
    """Remove keys of other stages, with a line that names all of them.

    Args:
        zero: the section ``zero_optimization``, after :func:`take_keys`.
        stage: of the file.
        notes: gets the line.
    """
    if stage == 3:
        for key in _STAGE_3_ONLY - {"sub_group_size"}:  # DeepSpeed takes either name
            if key in zero:
                zero.setdefault(f"stage3_{key}", zero.pop(key))
        return
    if stage == 0:
        others = sorted(zero.keys() - {"stage"})
    else:
        others = sorted(k for k in zero if k.removeprefix("stage3_") in _STAGE_3_ONLY)
    said = [k for k in others if zero[k] not in (None, AUTO) and not is_off(zero[k])]
    if stage == 0:
        # DeepSpeed is to tell what it does not know: the rest it reads and leaves alone.
        for key in others:
            if zero[key] == AUTO:
                del zero[key]
    else:
        for key in others:
            del zero[key]
    if said:
        names = ", ".join(printable(key, 60) for key in said)
        notes.append(f"zero_optimization at stage {stage}: {names} without effect")


def _find(config: dict[str, Any], place: str) -> tuple[dict[str, Any] | None, str]:
    """Find the object with the last name of a place, None for none; and that name."""
    *sections, key = place.split(".")
    holder: Any = config
    for name in sections:
        holder = holder.get(name)
        if not isinstance(holder, dict):
            return None, key
    return (holder if key in holder else None), key


def _asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    if value is None or any(value == each for each in harmless):
        return True
    # Of a switch that is on by default, off is a wish.
    return is_off(value) and True not in harmless


def _is_installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None
