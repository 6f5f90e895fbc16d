"""Telling one start of the processes from another in a store that outlives both."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable


def name_of_start(store: Any, rank: int, world: int) -> str:
    """A name, the same on all ranks, of this start of theirs; every rank calls it.

    torchrun keeps its store when it starts its processes again (with ``--master-addr`` or on one
    host), so what an earlier start has left there must not be taken for something of this one:
    rank 0 answers a question that each rank has made up anew, until all have heard the answer.

    Args:
        store: of ``torch.distributed``.
        rank: of this process.
        world: number of processes.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"start/asked/{rank}", mine)
        name = _made_here(store.get(f"start/told/{mine}"))
        store.add(f"start/heard/{name}", 1)
        return name
    asked = [f"start/asked/{other}" for other in range(1, world)]
    told: set[bytes] = set()
    if asked:
        store.wait(asked)
    while store.add(f"start/heard/{mine}", 0) < world - 1:
        for question in set(store.multi_get(asked)) - told:
            store.set(f"start/told/{_made_here(question)}", mine)
            told.add(question)
        time.sleep(0.02)
    return mine


def _made_here(name: bytes) -> str:
    """A name as this file makes them; UserError for anything else that the store may hold."""
    if not re.fullmatch(rb"[0-9a-f]{32}", name):
        raise UserError(
            f"the store where the processes meet holds {printable(name)!r} in the place of a "
            "start's name: somebody outside the job writes to its port"
        )
    return name.decode()
