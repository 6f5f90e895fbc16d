"""What a DeepSpeed JSON says of precision: checked against ``--precision``, and carried out by us.

Its ``bf16``, ``fp16`` and ``torch_autocast`` sections never reach DeepSpeed.
"""

from __future__ import annotations

import math
from typing import Any

from moco_scale.deepspeed_keys import refuse_unknown
from moco_scale.errors import UserError
from moco_scale.loss_scale import LossScaling

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


def check_sections(path: str, given: dict[str, Any]) -> None:
    """Refuse sections that say something else than on, off or ``"auto"``, or a misspelt key.

    Raises:
        UserError: names the section and the key.
    """
    for name in SECTIONS:
        section = given.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"DeepSpeed configuration {path}: {name} must be a JSON object")
        enabled = section.get("enabled", "auto")
        if not isinstance(enabled, bool) and enabled != "auto":
            raise UserError(
                f"DeepSpeed configuration {path}: {name}.enabled {enabled!r}: must be true, false "
                'or "auto"'
            )
        known = _HONOURED[name] | _WITHOUT_EFFECT[name].keys()
        refuse_unknown(path, section, known, f"{name}.")


def is_enabled(section: dict[str, Any] | None, automatic: bool) -> bool:
    """Whether a section is on; an absent or empty one is off, ``"auto"`` is what is given."""
    value = (section or {}).get("enabled", "auto" if section else False)
    return automatic if value == "auto" else bool(value)


def take_precision(
    path: str, config: dict[str, Any], precision: str, notes: list[str]
) -> LossScaling:
    """Check what the sections say against ``--precision`` and take them out.

    Args:
        path: of the file, for messages.
        config: what it holds; the sections are removed.
        precision: ``--precision``.
        notes: gets a line for each key that has no effect.

    Raises:
        UserError: a contradiction, or a value that cannot be.
    """
    scaling = LossScaling()
    for name, meant in SECTIONS.items():
        section = config.pop(name, None)
        if not section:
            continue
        wanted = precision in meant
        if is_enabled(section, wanted) != wanted:
            state, instead = ("disabled", "fp32") if wanted else ("enabled", meant[0])
            raise UserError(
                f"DeepSpeed configuration {path}: {name} is {state} but --precision is "
                f'{precision}; set "enabled": "auto" there or pass --precision {instead}'
            )
        if section.get("lower_precision_safe_modules"):
            raise UserError(
                f"DeepSpeed configuration {path}: torch_autocast.lower_precision_safe_modules "
                "would sum these modules' gradients in half precision; remove it"
            )
        if not wanted:
            continue
        if name == "fp16":
            scaling = _loss_scaling(path, section)
        dtype = section.get("dtype", "auto") if name == "torch_autocast" else "auto"
        if dtype not in HALF_NAMES[precision]:
            raise UserError(
                f"DeepSpeed configuration {path}: torch_autocast.dtype {dtype!r} contradicts "
                f"--precision {precision}"
            )
        for key, value in section.items():
            if key not in _HONOURED[name]:
                same, instead = _WITHOUT_EFFECT[name].get(key, (None, "it is unknown"))
                if value != same and value != "auto":
                    notes.append(f"{path}: {name}.{key} has no effect: {instead}")
    return scaling


def _loss_scaling(path: str, section: dict[str, Any]) -> LossScaling:
    """The dynamic loss scaling of an ``fp16`` section; ``"auto"`` means our default."""
    fixed = section.get("loss_scale", "auto")
    if fixed != "auto" and (isinstance(fixed, bool) or fixed != 0):
        raise UserError(
            f"DeepSpeed configuration {path}: fp16.loss_scale {fixed!r} is no scale that adapts; "
            "set it to 0, which does"
        )
    default = LossScaling()
    values = {}
    for key, usual, least, most in (
        ("initial_scale_power", math.log2(default.initial), 0, _LARGEST_POWER),
        ("loss_scale_window", default.window, 1, math.inf),
        ("min_loss_scale", default.minimum, 2.0**-_LARGEST_POWER, 2.0**_LARGEST_POWER),
    ):
        value = section.get(key, "auto")
        if value == "auto":
            value = usual
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most or value == math.inf:
            upto = "" if most == math.inf else f", at most {most:.4g}"
            raise UserError(
                f"DeepSpeed configuration {path}: fp16.{key} {value!r}: must be a number, at "
                f"least {least:.2g}{upto}"
            )
        values[key] = value
    initial, minimum = 2.0 ** values["initial_scale_power"], float(values["min_loss_scale"])
    if minimum > initial:
        raise UserError(
            f"DeepSpeed configuration {path}: fp16.min_loss_scale {minimum:g} is more than the "
            f"scale begins with, {initial:g} (fp16.initial_scale_power)"
        )
    return LossScaling(initial, int(values["loss_scale_window"]), minimum)
