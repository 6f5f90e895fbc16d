"""What processes say on standard error."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Write a line, at once and as a whole: where several processes write, lines do not mix.

    ``print`` writes the end of a line by itself, and other processes come between.
    """
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
