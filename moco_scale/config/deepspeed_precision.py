"""Precision in a DeepSpeed JSON: checked against ``--precision``, and implemented by us.

Its ``bf16``, ``fp16`` and ``torch_autocast`` sections never reach DeepSpeed.
"""

from __future__ import annotations

import math
from typing import Any

from moco_scale.config.deepspeed_keys import misspelt
from moco_scale.optim.loss_scale import LossScaling
from moco_scale.untrusted.deepspeed_file import is_number, shown
from moco_scale.utils.text import printable

SECTIONS = {"bf16": ("bf16",), "fp16": ("fp16",), "torch_autocast": ("bf16", "fp16")}
"""Sections that switch on a half precision, and which."""
HALF_NAMES = {
    "bf16": ("auto", "bf16", "bfloat16", "torch.bfloat16"),
    "fp16": ("auto", "fp16", "float16", "torch.float16", "half"),
}
_HONOURED = {
    "bf16": {"enabled"},
    "fp16": {
        *("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "min_loss_scale")
    },
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
_STORED = "weights, gradients and optimizer state are fp32 here"
# The value that says what is done anyway, and what is done.
_WITHOUT_EFFECT: dict[str, dict[str, tuple[Any, str]]] = {
    "bf16": {
        "immediate_grad_update": (False, _STORED),
        "check_grad_overflow": (False, "bf16 has no scale that a step could be too large for"),
        "bf16_master_weights_and_grads": (False, _STORED),
        "bf16_optimizer_states": (False, _STORED),
    },
    "fp16": {
        "hysteresis": (1, "the scale falls after each overflow"),
        "consecutive_hysteresis": (False, "the scale falls after each overflow"),
        "auto_cast": (True, "the model casts its inputs by itself"),
        "fp16_master_weights_and_grads": (False, _STORED),
    },
    "torch_autocast": {},
}
_LARGEST_POWER = 127  # of two in fp32, which the scaled loss is


def is_enabled(section: dict[str, Any] | None, automatic: bool) -> bool:
    """Tell whether a section is on; an absent or empty one is off, ``"auto"`` as given."""
    value = (section or {}).get("enabled", "auto" if section else False)
    return automatic if value == "auto" else bool(value)


def take_precision(
    config: dict[str, Any], precision: str, problems: list[str], notes: list[str]
) -> LossScaling:
    """Check the sections against ``--precision`` and remove them.

    Args:
        config: content of a file, of the right types; the sections are removed.
        precision: ``--precision``.
        problems: gets a line for each contradiction, misspelt key and impossible value.
        notes: gets a line for each key without effect.

    Returns:
        fp16's loss scale, ours where the file has nothing usable.
    """
    scaling = LossScaling()
    sections = {name: config.pop(name, None) or {} for name in SECTIONS}
    for name, section in sections.items():
        known = _HONOURED[name] | _WITHOUT_EFFECT[name].keys()
        wrong = misspelt(section, known, f"{name}.")
        problems += wrong.values()
        for key in wrong:
            del section[key]
    on = [name for name, section in sections.items() if section.get("enabled") is True]
    if len({"bf16", "fp16"} & set(on)) == 2:
        problems.append("bf16 and fp16 are both enabled: keep one of them")
        return scaling
    for name, meant in SECTIONS.items():
        section = sections[name]
        if not section:
            continue
        wanted = precision in meant
        if is_enabled(section, wanted) != wanted:
            state, instead = ("disabled", "fp32") if wanted else ("enabled", meant[0])
            problems.append(
                f"{name} is {state} but --precision is {precision}; set "
                f'"enabled": "auto" there or pass --precision {instead}'
            )
            continue
        if section.get("lower_precision_safe_modules"):
            problems.append(
                "torch_autocast.lower_precision_safe_modules would sum these modules' gradients "
                "in half precision; remove it"
            )
        if not wanted:
            continue
        if name == "fp16":
            scaling = _loss_scaling(section, problems)
        dtype = section.get("dtype") or "auto" if name == "torch_autocast" else "auto"
        if dtype not in HALF_NAMES[precision]:
            problems.append(
                f"torch_autocast.dtype {shown(dtype)} contradicts --precision {precision}"
            )
        for key, value in section.items():
            if key not in _HONOURED[name]:
                same, instead = _WITHOUT_EFFECT[name].get(key, (None, "it is unknown"))
                if value not in (same, "auto", None):
                    notes.append(f"{name}.{printable(key, 60)} has no effect: {instead}")
    return scaling


def _loss_scaling(section: dict[str, Any], problems: list[str]) -> LossScaling:
    """Read the dynamic loss scaling of an ``fp16`` section; ``"auto"`` means our default."""
    fixed = section.get("loss_scale")
    if fixed not in ("auto", None) and (isinstance(fixed, bool) or fixed != 0):
        problems.append(
            f"fp16.loss_scale {shown(fixed)} is no scale that adapts; set it to 0, which does"
        )
    default = LossScaling()
    values, wrong = {}, False
    for key, usual, least, most in (
        ("initial_scale_power", math.log2(default.initial), 0, _LARGEST_POWER),
        ("loss_scale_window", default.window, 1, 2**31),
        ("min_loss_scale", default.minimum, 2.0**-_LARGEST_POWER, 2.0**_LARGEST_POWER),
    ):
        value = section.get(key)
        if value in ("auto", None):
            value = usual
        if not is_number(value) or not least <= value <= most:
            wrong = True
            problems.append(
                f"fp16.{key} {shown(value)}: must be a number, at least {least:.2g}, at most "
                f"{most:.4g}"
            )
        values[key] = value
    if wrong:
        return default
    initial, minimum = 2.0 ** values["initial_scale_power"], float(values["min_loss_scale"])
    if minimum > initial:
        problems.append(
            f"fp16.min_loss_scale {minimum:g} is more than the scale begins with, {initial:g} "
            "(fp16.initial_scale_power)"
        )
        return default
    return LossScaling(initial, int(values["loss_scale_window"]), minimum)
