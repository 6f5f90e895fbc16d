"""The console script ``moco-scale``: as ``python -m moco_scale``, under a name of its own."""

import moco_scale.utils.quiet  # noqa: F401, I001  before all others

from functools import partial
from typing import NoReturn

from moco_scale.commands import dispatch
from moco_scale.commands.exit_status import run_program


def main() -> NoReturn:
    """Be the whole program."""
    run_program("moco-scale", partial(dispatch.main, prog="moco-scale"))
