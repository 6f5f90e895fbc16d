"""Import of matplotlib where the home is not writable, silently and leaving nothing."""

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
    """Import matplotlib within this block, before any other import of it.

    Where it cannot write to its folders below the home it gets a temporary one, which is removed
    after the block; it needs nothing of it later.

    Raises:
        OSError: No temporary folder can be made either.
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
