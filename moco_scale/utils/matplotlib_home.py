"""matplotlib where the home cannot be written: it starts without a word, and leaves nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PLACE = "MPLCONFIGDIR"


@contextlib.contextmanager
def matplotlib_home() -> Iterator[None]:
    """Import matplotlib inside, before anything else does.

    Where it cannot write to its folders below the home it gets one that goes with this block; it
    keeps nothing there that it needs later.

    Raises:
        OSError: no temporary folder can be made either.
    """
    if "matplotlib" in sys.modules or _PLACE in os.environ or _home_can_be_written():
        yield
        return
    logger = logging.getLogger("matplotlib")
    level = logger.level
    with tempfile.TemporaryDirectory(prefix="moco_scale-matplotlib-") as folder:
        os.environ[_PLACE] = folder
        logger.setLevel(logging.ERROR)  # that it makes its list of fonts, which may take seconds
        try:
            yield
        finally:
            logger.setLevel(level)
            del os.environ[_PLACE]


def _home_can_be_written() -> bool:
    try:
        for variable, below in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache")):
            folder = Path(os.environ.get(variable) or Path.home() / below) / "matplotlib"
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                return False
    except (OSError, RuntimeError):  # the latter: there is no home
        return False
    return True
