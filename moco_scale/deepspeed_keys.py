"""Which keys of a DeepSpeed JSON are known, and which would change what a run computes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from moco_scale.errors import UserError

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
"""What DeepSpeed 0.19 reads at the top of a file, or refuses by name."""

_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "communication_data_type": ("fp32",),
    "seq_parallel_communication_data_type": ("fp32",),
    "gradient_allreduce_op": ("mean",),
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1,),
    "disable_allgather": (False,),
    "managed_gradient_accumulation": (True,),
    "amp": ({},),
    "sequence_parallel_size": (1,),
    "tensor_parallel": ({}, {"autotp_size": 0}, {"autotp_size": 1}),
    "expert_parallel": ({}, {"enabled": False}),
    "weight_quantization": (),
    "data_efficiency": ({}, {"enabled": False}),
    "hybrid_engine": ({}, {"enabled": False}),
    "data_types.grad_accum_dtype": ("fp32",),
    "data_types.param_dtype": ("fp32",),
    "data_types.buffer_dtype": ("fp32",),
    "zero_optimization.zero_quantized_weights": (False,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
    "zero_optimization.zero_quantized_gradients": (False,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.mics_shard_size": (),
    "zero_optimization.zenflow": (),
}
"""Keys that change what is computed or summed, with the values besides null that do not."""

_OLD_NAMES = {"bfloat16": "bf16"}


def refuse_unknown(path: str, given: Iterable[str], known: Iterable[str], place: str = "") -> None:
    """Refuse a key that DeepSpeed does not know and that looks like one it does.

    Args:
        path: of the file.
        given: its keys.
        known: those there are.
        place: of both in the file, with a dot at its end; at the top by default.

    Raises:
        UserError: names the key and what it may be meant to be.
    """
    known = set(known)
    for key in given:
        if key in known:
            continue
        meant = _OLD_NAMES.get(key) or next(
            iter(difflib.get_close_matches(key, known, 1, 0.75)), ""
        )
        if meant:
            raise UserError(
                f"DeepSpeed configuration {path}: {place}{key} is unknown; do you mean {meant}?"
            )


def check_keys(path: str, config: dict[str, Any]) -> list[str]:
    """Refuse what is misspelt or would change a run's results; a line for what is ignored.

    Args:
        path: of the file, for messages.
        config: what it holds.

    Raises:
        UserError: names the key.
    """
    refuse_unknown(path, config, KNOWN)
    for place, harmless in _HARMLESS_VALUES.items():
        *sections, key = place.split(".")
        section: Any = config
        for name in sections:
            section = section.get(name) or {}
            if not isinstance(section, dict):
                raise UserError(f"DeepSpeed configuration {path}: {name} must be a JSON object")
        value = section.get(key)
        if value is not None and value not in harmless:
            raise UserError(
                f"DeepSpeed configuration {path}: {place} changes how gradients or weights are "
                "computed, stored or summed, which must not depend on the engine; remove it"
            )
    unknown = sorted(config.keys() - KNOWN)
    if not unknown:
        return []
    return [f"{path}: DeepSpeed does not know {', '.join(unknown)}: without effect"]
