"""The command line of ``train.py``, made from the configuration: one flag per field."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from moco_scale.config import options, settings_file
from moco_scale.config.older_flags import PRETRAINING, HintingParser
from moco_scale.config.recipes import DEFAULT_RECIPE, RECIPES
from moco_scale.config.resolve import build
from moco_scale.config.schema import SECTIONS, Config
from moco_scale.data.remote.credentials import warn_of_printed
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import show_from

AMP_LEVELS = ("O0", "O1", "O2", "O3")


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``train.py``: one flag per field."""
    parser = HintingParser(
        prog="train.py",
        older=PRETRAINING,
        description="Momentum-contrast pretraining.",
        allow_abbrev=False,
    )
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add everything that :func:`config_of` reads."""
    parser.usage = f"{parser.prog} [flags]"
    parser.epilog = "Flags without a default here take the recipe's value (docs/recipes.md)."
    settings_file.add_flag(parser, *SECTIONS.values())
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=DEFAULT_RECIPE,
        help=f"published settings (default: {DEFAULT_RECIPE})",
    )
    add_older_flags(parser)
    # Options that every recipe decides.
    unsaid = set.intersection(*(set(recipe.settings) for recipe in RECIPES.values()))
    for section, cls in SECTIONS.items():
        options.add_flags(parser.add_argument_group(section), cls, unsaid)


def add_older_flags(parser: argparse.ArgumentParser) -> None:
    """Add what launchers and command lines of 2020 give; :func:`precision_asked` reads it."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--amp-opt-level",
        choices=AMP_LEVELS,
        help="older name of --precision: O0 is fp32, the others fp16",
    )


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read a command line, and show messages as it says.

    Raises:
        UserError: values that contradict each other or cannot work.
    """
    config = config_of(vars(make_parser().parse_args(argv)))
    show_from(config.run.log_level)
    warn_of_printed(config.data.data_dir)
    return config


def config_of(args: Mapping[str, Any]) -> Config:
    """The configuration that parsed flags ask for; others than train.py's are ignored.

    Raises:
        UserError: values that contradict each other or cannot work.
    """
    args = {**args, "precision": precision_asked(args)}
    return build(args["recipe"], options.given(args, *SECTIONS.values()))


def precision_asked(args: Mapping[str, Any]) -> str | None:
    """The precision that --precision or --amp-opt-level asks for.

    Raises:
        UserError: they ask for different ones.
    """
    level, precision = args["amp_opt_level"], args["precision"]
    if level is None:
        return precision
    means = "fp32" if level == "O0" else "fp16"
    if precision not in (None, means):
        raise UserError(
            f"--amp-opt-level {level} means {means} but --precision is {precision}; drop one"
        )
    return means
