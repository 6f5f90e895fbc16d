"""Parser of argparse for programs that run on several ranks."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from moco_scale.distributed.launchers import rank_of, speaker
from moco_scale.utils.log import log
from moco_scale.utils.text import printable_lines


class Parser(argparse.ArgumentParser):
    """Reports errors of a command line at length on rank 0, in one line on others."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable_lines(message, 1 << 20), file)

    def error(self, message: str) -> NoReturn:
        if rank_of(os.environ) == 0:
            super().error(message)
        # No other may have this error: a file, a variable or a typing mistake of one host alone.
        log.error(f"{self.prog}: error: {speaker(os.environ)}{message}")
        sys.exit(2)
