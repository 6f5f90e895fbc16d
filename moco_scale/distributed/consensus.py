"""Consensus of ranks: broadcast results, shared errors, rank 0 first.

An error of one rank is raised on all, so that none waits for a rank that has ended.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch

from moco_scale.distributed import collectives
from moco_scale.utils.errors import PeerLost, UserError
from moco_scale.utils.progress import progress_count, progressed

T = TypeVar("T")


def first_error(error: UserError | None, group: Any = None) -> UserError | None:
    """Return the error of the lowest rank that has one, on every rank.

    Args:
        error: this rank's, or None.
        group: of :func:`collectives.side_group`; the default is for the main thread.
    """
    if collectives.world_size() == 1:
        return error
    mine = None if error is None else (socket.gethostname(), str(error), error.status)
    for number, each in enumerate(collectives.gather_objects(mine, group)):
        if each is not None:
            # Rank 0 meets what all ranks meet; an error of others needs its rank and host.
            place = f"rank {number} on {each[0]}: " if number else ""
            found = UserError(place + each[1])
            found.status = each[2]
            return found
    return None


def raise_on_all_ranks(action: Callable[[], T], group: Any = None) -> T:
    """Run something on every rank, and raise an error of one on all.

    Args:
        action: what to run.
        group: as in :func:`first_error`.

    Raises:
        UserError: The lowest rank's, of those on which ``action`` raised one.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    failure = first_error(failure, group)
    if failure is not None:
        raise failure
    return cast(T, result)


def rank0_first(action: Callable[[], T]) -> T:
    """Run something on every rank: rank 0 first, then the first of every host, then the others.

    For what leaves something behind that later processes find, on a shared disk or on their own.
    It may take any time, as long as it progresses (see `utils.progress`) on some rank; those that
    wait for it then progress as well.

    Raises:
        UserError: that of the lowest rank in whose turn ``action`` raised one.
        PeerLost: nobody whose turn it is has got on for as long as a collective may take.
    """
    turn = 0 if collectives.rank() == 0 else 1 if collectives.local_rank() == 0 else 2
    results = [raise_on_all_ranks(partial(_turn, action, turn == now)) for now in range(3)]
    return cast(T, results[turn])


def _turn(action: Callable[[], T], mine: bool) -> T | None:
    if collectives.world_size() == 1:
        return action() if mine else None
    if not mine:
        _until_all_are_done(lambda wait: (False, 0))
        return None
    done, met = threading.Event(), list[Exception]()

    def state(wait: float) -> tuple[bool, int]:
        return (False, 0) if done.wait(wait) else (True, progress_count())

    def report() -> None:
        try:
            _until_all_are_done(state)
        except Exception as error:
            met.append(error)

    # This rank's only messages meanwhile: the action sends none.
    reporting = threading.Thread(target=report, name="turn", daemon=True)
    reporting.start()
    try:
        result = action()
    finally:
        done.set()
        reporting.join()
    if met:
        raise met[0]
    return result


def _until_all_are_done(state: Callable[[float], tuple[bool, int]]) -> None:
    """Exchange small messages until no rank is at work any more.

    state: given how long it may wait for the end, says whether this rank is at work and how often
    it has progressed. Raises PeerLost, on all ranks at once.
    """
    wait, before, since = 0.01, -1, time.monotonic()
    while True:
        working, signs = state(wait)
        now = time.monotonic()
        late = now - since > collectives.time_out()
        at_work, signs, given_up = collectives.sum_(torch.tensor([working, signs, late])).tolist()
        if not at_work:
            return
        if signs != before:
            before, since = signs, now
            if not working:  # else this would count as progress of its own
                progressed()
        elif given_up:
            raise PeerLost(
                f"{at_work} rank(s) have been preparing data, and have not got on for "
                f"{now - since:.0f} s"
            )
        wait = min(1.0, 2 * wait)


def broadcast_from_main(action: Callable[[], T]) -> T:
    """Run something on rank 0; return its small picklable result, or raise its error, on all."""
    return collectives.broadcast_object(
        raise_on_all_ranks(lambda: action() if collectives.is_main() else None)
    )
