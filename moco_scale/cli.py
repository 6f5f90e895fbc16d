"""How commands end: a user's error is a message without a traceback, and status 2."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from moco_scale.errors import (
    LOST_PEER,
    PeerLost,
    RankError,
    StoppedEarly,
    UserError,
    first_line,
    is_peer_gone,
)
from moco_scale.launchers import rank_of
from moco_scale.messages import say

STOPPED_EARLY = 75
"""Status of a run that stopped early and can go on: EX_TEMPFAIL of sysexits.h."""


def run_command(name: str, action: Callable[[], int | None]) -> int:
    """Run a command's body; print a :class:`UserError` without a traceback.

    Args:
        name: the program's name, for the message.
        action: returns an exit status, None meaning 0.
    """
    try:
        return action() or 0
    except UserError as error:
        if isinstance(error, RankError):  # which says whose it is
            say(f"{name}: error: {error}")
        elif _speaks():
            say(f"{name}: error: {_who()}{error}")
        return 2
    except StoppedEarly as stop:
        if _rank() == 0:
            say(f"{name}: {stop}")
        return STOPPED_EARLY
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return 130
    except PeerLost as error:
        say(f"{name}: {error}")
        return LOST_PEER
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_peer_gone(error):
            raise
        # A traceback here would bury the message of the process that caused it.
        say(
            f"{name}: rank {_rank()} stops too: another process ended, for the reason it gave, or "
            f"the network failed ({first_line(error)})"
        )
        return LOST_PEER
    except BrokenPipeError:
        # The reader of our output (such as `head`) is gone; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def leave(status: int) -> NoReturn:
    """End this process; as one of several without the interpreter's teardown.

    After a failure it would wait for collectives that other ranks never join; after a success, the
    threads of gloo and DeepSpeed now and then abort it ("terminate called without an active
    exception"), and a finished run would look failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line: at length on rank 0, in one line on the others."""

    def error(self, message: str) -> NoReturn:
        if _rank() == 0:
            super().error(message)
        # No other may have this error: a file, a variable or a typing mistake of one host alone.
        say(f"{self.prog}: error: {_who()}{message}")
        sys.exit(2)


def _speaks() -> bool:
    """Whether an error is for this rank to say.

    Ranks that have met share their errors, and rank 0 says them for all. Before that nobody knows
    whether another has the same one.
    """
    distributed = sys.modules.get("moco_scale.distributed")  # not loaded: nobody has met
    return _rank() == 0 or distributed is None or not distributed.have_met()


def _who() -> str:
    rank = _rank()
    return f"rank {rank} on {socket.gethostname()}: " if rank else ""


def _rank() -> int:
    return rank_of(os.environ)
