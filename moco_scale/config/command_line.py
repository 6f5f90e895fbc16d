"""The command line of ``train.py``, made from the configuration: one flag per field."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from moco_scale.config.flag_types import whole_numbers
from moco_scale.config.older_flags import PRETRAINING, HintingParser
from moco_scale.config.recipes import DEFAULT_RECIPE, RECIPES
from moco_scale.config.resolve import build
from moco_scale.config.schema import SECTIONS, Config
from moco_scale.data.remote.credentials import warn_of_printed
from moco_scale.utils.errors import UserError

AMP_LEVELS = ("O0", "O1", "O2", "O3")


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``train.py``: one flag per field."""
    parser = HintingParser(
        prog="train.py",
        older=PRETRAINING,
        description="Momentum-contrast pretraining.",
        epilog="Flags whose default is not said take the recipe's value (docs/recipes.md).",
        allow_abbrev=False,
    )
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add everything that :func:`config_of` reads."""
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=DEFAULT_RECIPE,
        help=f"published settings (default: {DEFAULT_RECIPE})",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--amp-opt-level",
        choices=AMP_LEVELS,
        help="older name of --precision: O0 is fp32, the others fp16",
    )
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section)
        for field in fields(cls):
            _add_flag(group, field)


def _add_flag(group: Any, field: dataclasses.Field[Any]) -> None:
    meta = dict(field.metadata)
    names = ["--" + field.name.replace("_", "-"), *meta.get("flags", ())]
    text = meta["help"].replace("%", "%%") + _default_of(field)
    keywords: dict[str, Any] = {"dest": field.name, "default": None}
    if isinstance(field.default, bool):
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text, **keywords)
        return
    choices = meta.get("choices")
    if isinstance(field.default, tuple):
        keywords |= {"nargs": "+", "type": whole_numbers, "metavar": "N"}
    else:
        keywords["type"] = meta.get("type", type(field.default))
        if not choices:
            keywords["metavar"] = meta.get("metavar", type(field.default).__name__.upper())
    group.add_argument(*names, choices=choices, help=text, **keywords)


def _default_of(field: dataclasses.Field[Any]) -> str:
    """What a flag's help says of its default, unless it is the recipe's or said already."""
    text, default = field.metadata["help"], field.default
    if (
        default == ""
        or "default" in text
        or all(field.name in r.settings for r in RECIPES.values())
    ):
        return ""
    if isinstance(default, bool):
        return f" (default: {'yes' if default else 'no'})"
    if isinstance(default, tuple):
        return f" (default: {','.join(map(str, default))})"
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read a command line.

    Raises:
        UserError: values that contradict each other or cannot work.
    """
    config = config_of(vars(make_parser().parse_args(argv)))
    warn_of_printed(config.data.data_dir)
    return config


def config_of(args: Mapping[str, Any]) -> Config:
    """The configuration that parsed flags ask for; others than train.py's are ignored.

    Raises:
        UserError: values that contradict each other or cannot work.
    """
    args = dict(args)
    amp = args["amp_opt_level"]
    if args["lr_decay_epochs"] is not None:
        args["lr_decay_epochs"] = tuple(n for part in args["lr_decay_epochs"] for n in part)
    if amp is not None:
        args["precision"] = precision_of_amp(amp, args["precision"])
    known = {f.name for cls in SECTIONS.values() for f in fields(cls)}
    given = {k: v for k, v in args.items() if v is not None and k in known}
    return build(args["recipe"], given)


def precision_of_amp(level: str, precision: str | None) -> str:
    """The precision that one of :data:`AMP_LEVELS` means; UserError where another is asked for."""
    means = "fp32" if level == "O0" else "fp16"
    if precision not in (None, means):
        raise UserError(
            f"--amp-opt-level {level} means {means} but --precision is {precision}; drop one"
        )
    return means
