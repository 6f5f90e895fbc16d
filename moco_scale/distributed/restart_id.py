"""Names of starts, to tell one from another in a store that outlives both."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable


def name_of_start(store: Any, rank: int, world: int) -> str:
    """Name this start, the same on all ranks; every rank calls it.

    torchrun keeps its store when it restarts its processes (with ``--master-addr`` or on one
    host), so keys of an earlier start must not be mistaken for this one's: each rank asks with a
    new random key, and rank 0 answers until all have the name.

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
    """Check that a name has this file's form. Raises UserError for anything else in the store."""
    if not re.fullmatch(rb"[0-9a-f]{32}", name):
        raise UserError(
            f"the store where the processes meet holds {printable(name)!r} instead of a start's "
            "name: somebody outside the job writes to its port; close it to others"
        )
    return name.decode()
