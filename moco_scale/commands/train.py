"""Pretrain an encoder by momentum contrast."""

from __future__ import annotations

import argparse
from pathlib import Path

from moco_scale.config import command_line
from moco_scale.data.remote.credentials import warn_of_printed
from moco_scale.distributed import collectives
from moco_scale.utils.log import show_from

add_arguments = command_line.add_flags


def run(args: argparse.Namespace) -> None:
    """Train as the flags say, or look whether it could be done (``--preflight``).

    Raises:
        UserError: Something does not fit; every rank raises it.
    """
    config = command_line.config_of(vars(args))
    show_from(config.run.log_level)
    warn_of_printed(config.data.data_dir)
    timeout = config.run.hang_timeout
    collectives.initialize(config.run.device, hang_timeout=timeout)
    from moco_scale.observe.phases import Phases
    from moco_scale.observe.watchdog import Watch

    phases = Phases()
    with Watch(phases, timeout, Path(config.run.output_dir), args.program):
        if config.run.preflight:
            from moco_scale.commands import preflight

            preflight.run(config, phases)
        else:
            from moco_scale.training.loop import train
            from moco_scale.training.run import Run

            train(Run(config, phases))
    collectives.shutdown()
