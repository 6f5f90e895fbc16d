"""Dispatch of a command line to the command that its first word names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from moco_scale.commands.exit_status import run_command, run_program
from moco_scale.config.flag_types import DefaultsHelpFormatter
from moco_scale.config.older_flags import EVALUATION, PRETRAINING, HintingParser
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log, tell, unwritten

# Name: what it is for. The module of that name has add_arguments and run; it is only imported when
# its command runs, so that `shard` does not wait for DeepSpeed.
COMMANDS = {
    "train": "pretrain an encoder",
    "evaluate": "say what a pretrained encoder is worth: linear classifier or kNN",
    "shard": "turn images into WebDataset shards",
    "flops": "count the FLOPs of a model and of training it",
    "plan": "say what a run needs: memory, traffic, time, cores",
    "inspect": "say what a checkpoint or a folder of shards holds",
    "demo": "a complete small run on images it renders itself",
    "cifar10": "a complete run on CIFAR-10",
}
OLDER = {"train": PRETRAINING, "plan": PRETRAINING, "evaluate": EVALUATION}

PASSING_ON = ("demo", "cifar10")
"""Commands that pass flags which are not their own on to training."""

PRINTING = ("flops", "plan", "inspect")
"""Commands that have done nothing when what they print is lost."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m moco_scale") -> int:
    """Carry out the command that the first word names.

    Args:
        argv: the words; those of this process where none are given.
        prog: how the program was started, for usage and messages.

    Returns:
        An exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank="):
        del argv[0]  # of `deepspeed --module moco_scale COMMAND`, which says LOCAL_RANK too
    name = argv[0] if argv else ""
    program = prog.rpartition(" ")[2]
    if name in COMMANDS:
        return carry_out(name, argv[1:], f"{prog} {name}", program)
    rows = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    asked = name in ("-h", "--help")
    (tell if asked else log.error)(f"usage: {prog} COMMAND ...\n\ncommands:\n{rows}")
    if name and not asked:
        log.error(f"{program}: error: unknown command {name!r}")
    return 0 if asked else 2


def script(command: str, program: str) -> NoReturn:
    """Be a whole program for one command: ``train.py`` or ``eval.py``."""
    run_program(program, partial(carry_out, command, None, program, program))


def carry_out(name: str, argv: Sequence[str] | None, prog: str, program: str) -> int:
    """Carry out a command.

    Args:
        name: one of :data:`COMMANDS`.
        argv: its own words; those of this process where none are given.
        prog: what starts it, for usage.
        program: who speaks, for messages.

    Returns:
        An exit status.
    """
    module = importlib.import_module(f"moco_scale.commands.{name}")
    parser = HintingParser(
        older=OLDER.get(name, {}),
        prog=prog,
        formatter_class=DefaultsHelpFormatter,
        description=(module.__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
    )
    module.add_arguments(parser)

    def act() -> int:
        args, unknown = parser.parse_known_args(argv)
        if name in PASSING_ON:
            args.passthrough = unknown
        elif unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.prog, args.program = prog, program
        status = int(module.run(args) or 0)
        if name in PRINTING and (why := unwritten()):
            raise UserError(f"what {name} prints could not be written: {why}")
        return status

    return run_command(program, act)
