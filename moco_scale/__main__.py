"""``python -m moco_scale COMMAND``."""

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

from moco_scale.commands.dispatch import main
from moco_scale.commands.exit_status import run_program

__all__ = ["main"]

if __name__ == "__main__":
    run_program("moco_scale", main)
