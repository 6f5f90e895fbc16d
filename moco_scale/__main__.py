"""``python -m moco_scale COMMAND``."""

from __future__ import annotations

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

import importlib
import sys
from collections.abc import Sequence

from moco_scale.commands.exit_status import run_command, run_program
from moco_scale.config.flag_types import DefaultsHelpFormatter
from moco_scale.config.older_flags import PRETRAINING, HintingParser
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log, tell, unwritten

# Name: (module with add_arguments and run, what it is for). A module is only imported when its
# command runs, so that `shard` does not wait for DeepSpeed.
COMMANDS = {
    "shard": ("moco_scale.commands.shard", "turn images into WebDataset shards"),
    "flops": ("moco_scale.commands.flops", "count the FLOPs of a model and of training it"),
    "plan": ("moco_scale.commands.plan", "say what a run needs: memory, traffic, time, cores"),
    "inspect": ("moco_scale.commands.inspect", "say what a checkpoint or a folder of shards holds"),
    "demo": ("moco_scale.commands.demo", "a complete small run on images it renders itself"),
    "cifar10": ("moco_scale.commands.cifar10", "a complete run on CIFAR-10"),
}

HANDING_ON = ("demo", "cifar10")
"""Commands that give flags which are not their own to train.py, and say which it does not know."""


PRINTING = ("flops", "plan", "inspect")
"""Commands that have done nothing when what they print is lost."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command by name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        rows = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
        asked = name in ("-h", "--help")
        (tell if asked else log.error)(
            f"usage: python -m moco_scale COMMAND ...\n\ncommands:\n{rows}"
        )
        if name and not asked:
            log.error(f"moco_scale: error: unknown command {name!r}")
        return 0 if asked else 2
    module = importlib.import_module(COMMANDS[name][0])
    parser = HintingParser(
        older=PRETRAINING if name == "plan" else {},
        prog=f"python -m moco_scale {name}",
        formatter_class=DefaultsHelpFormatter,
        description=(module.__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, unknown = parser.parse_known_args(argv[1:])
    if name in HANDING_ON:
        args.passthrough = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")

    def act() -> int:
        status = int(module.run(args) or 0)
        if name in PRINTING and (why := unwritten()):
            raise UserError(f"what {name} prints could not be written: {why}")
        return status

    return run_command("moco_scale", act)


if __name__ == "__main__":
    run_program("moco_scale", main)
