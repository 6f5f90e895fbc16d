"""DeepSpeed JSON of the user, read within bounds; every value used here has its type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import moco_scale
from moco_scale.untrusted.documents import DocumentError, parse_json, read_named, said_twice
from moco_scale.untrusted.limits import SETTINGS_JSON
from moco_scale.utils.text import printable

WHAT = "DeepSpeed configuration"
AUTO = "auto"
_PACKAGED = Path(moco_scale.__file__).parent / "ds_configs"
_OLDER = re.compile(r"(?P<file>(?:.*/)?zero[0-3])_(?P<precision>bf16|fp16)\.json")
_LARGEST = 1 << 62
"""Largest number in a file: sums of a few still fit 64 bits."""

Test = Callable[[Any], bool]


def _whole(least: int) -> Test:
    return lambda value: type(value) is int and value >= least  # true would be 1


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number of a possible size; ``true`` is none."""
    return _is_any_number(value) and _fits(value)


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


def _one_of(*values: Any) -> Test:
    return lambda value: any(type(value) is type(v) and value == v for v in values)


def _is(kind: type) -> Test:
    return lambda value: isinstance(value, kind)


_SECTION = (_is(dict), "a JSON object")
_SWITCH = (_one_of(True, False), "true or false")
_SWITCH_OR_AUTO = (_one_of(True, False, AUTO), 'true, false or "auto"')
_COUNT = (_whole(1), "a whole number of at least 1")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_SECTIONS = """
    activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger compile csv_monitor
    data_types fp16 flops_profiler pipeline tensorboard timers timers.throughput torch_autocast
    wandb zero_optimization zero_optimization.offload_optimizer
"""
_SWITCHES = """
    comet.enabled comms_logger.enabled comms_logger.verbose csv_monitor.enabled disable_python_gc
    flops_profiler.enabled flops_profiler.detailed memory_breakdown tensorboard.enabled
    timers.throughput.enabled timers.throughput.synchronized wall_clock_breakdown wandb.enabled
"""

# Of what stands in a file, and "auto" besides where the last is true.
_TYPES: dict[str, tuple[Test, str, bool]] = {
    **{name: (*_SECTION, False) for name in _SECTIONS.split()},
    **{name: (*_SWITCH, False) for name in _SWITCHES.split()},
    **{f"{name}.enabled": (*_SWITCH_OR_AUTO, False) for name in ("bf16", "fp16", "torch_autocast")},
    "torch_autocast.dtype": (_is(str), 'a name such as "bf16"', False),
    "train_batch_size": (*_COUNT, True),
    "train_micro_batch_size_per_gpu": (*_COUNT, True),
    "gradient_accumulation_steps": (*_COUNT, True),
    "gradient_clipping": (_not_negative, "a number, 0 for none", True),
    "zero_allow_untested_optimizer": (*_SWITCH, True),
    "zero_force_ds_cpu_optimizer": (*_SWITCH, True),
    "steps_per_print": (*_COUNT, True),
    "log_level": (_one_of(*_LEVELS), f"one of {', '.join(_LEVELS)}", False),
    "flops_profiler.profile_step": (*_COUNT, False),
    "flops_profiler.module_depth": (_whole(-1), "a whole number, -1 for all", False),
    "flops_profiler.top_modules": (*_COUNT, False),
    "flops_profiler.recompute_fwd_factor": (_not_negative, "a number from 0 on", False),
    "flops_profiler.output_file": (_is(str), "the name of a file", False),
    "zero_optimization.stage": (_one_of(0, 1, 2, 3), "one of 0, 1, 2, 3", False),
    "zero_optimization.overlap_comm": (*_SWITCH, True),
    "zero_optimization.reduce_bucket_size": (_not_negative, "a number of elements", True),
    "zero_optimization.allgather_bucket_size": (_not_negative, "a number of elements", True),
    "zero_optimization.compute_grad_norm": (*_SWITCH, True),
    "zero_optimization.sub_group_size": (*_COUNT, True),
}
_NEEDED = ["bf16", "fp16", "timers", "timers.throughput", "torch_autocast", "zero_optimization"]
"""Sections for which null is not the same as leaving them out."""


def located(name: str) -> Path:
    """Find the file that ``--deepspeed`` names: a path, or ``zero0`` to ``zero3`` of this package.

    Raises:
        DocumentError: An earlier version's file, one for each half precision.
    """
    path = Path(name)
    if path.is_file():
        return path
    if older := _OLDER.fullmatch(name):
        raise DocumentError(
            f"{WHAT} {printable(name)} is gone: say --deepspeed {printable(older['file'])}.json "
            f"--precision {older['precision']}"
        )
    return _PACKAGED / f"{name}.json" if re.fullmatch("zero[0-3]", name) else path


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Args:
        path: as :func:`located` takes it.

    Raises:
        DocumentError: It is missing, unreadable, too large, no JSON object, or has a key twice.
    """
    content = read_named(located(path), SETTINGS_JSON, WHAT)
    what = f"{WHAT} {printable(path)}"
    given = parse_json(content, what)  # which bounds the depth: what follows cannot recurse far
    if not isinstance(given, dict):
        raise DocumentError(f"{what}: must be a JSON object")
    if twice := said_twice(content):
        names = ", ".join(printable(name, 60) for name in twice)
        raise DocumentError(f"{what}: {names} stands there twice; keep one")
    return given


def wrong_types(content: dict[str, Any]) -> dict[str, str]:
    """Find values of wrong types: the problem by place, such as ``fp16.enabled``."""
    found = {}
    for place, (fits, must, automatic) in _TYPES.items():
        holder = _holder(content, place)
        key = place.rpartition(".")[2]
        if holder is None or key not in holder:
            continue
        value = holder[key]
        if (automatic and value == AUTO) or fits(value):
            continue
        if value is None and place not in _NEEDED:
            continue
        found[place] = f"{place} {shown(value)}: must be {must}"
    for place, number in _numbers(content, ""):
        if not _fits(number):
            found.setdefault(place, f"{place}: {shown(number)} is no number that it can be")
    return found


def remove(content: dict[str, Any], place: str) -> None:
    """Remove the value at a place, if there is one."""
    holder = _holder(content, place)
    if holder is not None:
        holder.pop(place.rpartition(".")[2], None)


def shown(value: Any) -> str:
    """Return a value as Python writes it, printable."""
    return printable(repr(value), 80)


def _holder(content: dict[str, Any], place: str) -> dict[str, Any] | None:
    """Find the object that should have the last name of a place; None: it is missing."""
    section: Any = content
    for name in place.split(".")[:-1]:
        section = section.get(name)
        if not isinstance(section, dict):
            return None
    return section


def _numbers(value: Any, place: str) -> Iterator[tuple[str, int | float]]:
    """Yield every number in a document, with its place; at most 200 levels deep."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, f"{place}.{printable(key, 60)}" if place else printable(key))
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each, place)
    elif _is_any_number(value):
        yield place, value


def _is_any_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(number: int | float) -> bool:
    # Not isfinite of a whole number, which may have no float.
    return -_LARGEST <= number <= _LARGEST
