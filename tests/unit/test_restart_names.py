"""Each start of the processes has a name of its own, whatever an earlier one left in the store."""

import random
import threading
import time

import pytest
import torch.distributed as dist

from moco_scale.distributed.restart_id import name_of_start
from moco_scale.utils.errors import UserError


def start(store: dist.Store, world: int, seed: int) -> set[str]:
    """The names that the ranks of one start find, arriving in any order."""
    names: list[str] = []
    order = random.Random(seed).sample(range(world), world)

    def arrive(place: int) -> None:
        time.sleep(0.01 * place)
        names.append(name_of_start(store, order[place], world))

    threads = [threading.Thread(target=arrive, args=(place,)) for place in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(names) == world
    return set(names)


def test_starts_are_told_apart() -> None:
    store = dist.HashStore()
    seen: set[str] = set()
    for attempt in range(4):
        found = start(store, 4, attempt)
        assert len(found) == 1
        assert not found & seen
        seen |= found


def test_a_start_that_was_cut_short_is_no_hindrance() -> None:
    store = dist.HashStore()
    store.set("start/asked/1", "1" * 32)
    store.set("start/asked/2", "2" * 32)
    assert len(start(store, 3, 0)) == 1


def test_what_a_stranger_has_left_there_is_an_error() -> None:
    store = dist.HashStore()
    store.set("start/asked/1", "\x1b[2J")
    with pytest.raises(UserError, match="somebody outside the job"):
        name_of_start(store, 0, 2)


def test_a_process_on_its_own_waits_for_nobody() -> None:
    store = dist.HashStore()
    assert name_of_start(store, 0, 1) != name_of_start(store, 0, 1)
