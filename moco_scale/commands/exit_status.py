"""How commands end: a user's error is a message without a traceback, and status 2."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from moco_scale.distributed.launcher_watch import leave_with_launcher
from moco_scale.distributed.launchers import rank_of, speaker
from moco_scale.utils.errors import (
    INTERRUPTED,
    LOST_PEER,
    PeerLost,
    RankError,
    StoppedEarly,
    UserError,
    first_line,
    is_peer_gone,
    limit_met,
)
from moco_scale.utils.log import log, outlive_terminal
from moco_scale.utils.own_folders import remove_passing
from moco_scale.utils.signals import interruptible


def run_program(name: str, action: Callable[[], int | None]) -> NoReturn:
    """Be a whole program: run a command's body, and end this process with its status.

    Its output may be closed at any moment, its launcher may die, and Ctrl-C leaves nothing behind.
    """
    outlive_terminal()
    leave_with_launcher(os.environ)

    def interrupted() -> NoReturn:
        log.error(f"{name}: interrupted")
        leave(INTERRUPTED)

    status = 1
    try:
        with interruptible(interrupted):
            try:
                status = run_command(name, action)
            except SystemExit as end:  # of argparse, after --help too
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    log.error(end.code)
            except Exception:  # a defect
                log.error(traceback.format_exc().rstrip())
    except KeyboardInterrupt:
        status = INTERRUPTED  # it has been said, or everything was done
    leave(status)


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
            log.error(f"{name}: error: {error}")
        elif _speaks():
            log.error(f"{name}: error: {speaker(os.environ)}{error}")
        return error.status
    except StoppedEarly as stop:
        if rank_of(os.environ) == 0:
            log.error(f"{name}: {stop}")
        return stop.status
    except KeyboardInterrupt:
        log.error(f"{name}: interrupted")
        return INTERRUPTED
    except PeerLost as error:
        log.error(f"{name}: {error}")
        return LOST_PEER
    except (OSError, MemoryError, RuntimeError) as error:
        if met := limit_met(error):
            log.error(f"{name}: error: {speaker(os.environ)}{met}")
            return UserError.status
        if not isinstance(error, RuntimeError):
            raise
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_peer_gone(error):
            raise
        # A traceback here would bury the message of the process that caused it.
        log.error(
            f"{name}: rank {rank_of(os.environ)} stops too: another process ended, for the reason "
            f"it gave, or the network failed ({first_line(error)})"
        )
        return LOST_PEER


def leave(status: int) -> NoReturn:
    """End this process and those that it has started, without the interpreter's teardown.

    After a failure that would wait for collectives that other ranks never join, and for children
    that do not answer; after a success, the threads of gloo, DeepSpeed and a save now and then
    abort it ("terminate called without an active exception"), and a finished run would look failed.
    From any thread.
    """
    for child in multiprocessing.active_children():
        child.kill()
    remove_passing()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _speaks() -> bool:
    """Whether an error is for this rank to say.

    Ranks that have met share their errors, and rank 0 says them for all. Before that nobody knows
    whether another has the same one.
    """
    collectives = sys.modules.get("moco_scale.distributed.collectives")
    met = collectives is not None and collectives.have_met()  # not loaded: nobody has
    return rank_of(os.environ) == 0 or not met
