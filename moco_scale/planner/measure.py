"""Measurements of a real step to compare a plan with: collectives' messages and memory."""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moco_scale.planner.traffic import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER

# c10d's operators: their kind in a plan, and which argument is the whole message.
_OPERATORS = {
    "allreduce_": (ALL_REDUCE, 0),
    "_allgather_base_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "alltoall_base_": (ALL_TO_ALL, 1),
}


class CollectiveCounter(TorchDispatchMode):
    """Mode that adds up the messages of this thread's collectives, including the engines'.

    Attributes:
        payload: bytes by kind, as in :class:`moco_scale.planner.traffic.Collective`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            kind, place = _OPERATORS.get(func._opname, (func._opname, 0))
            tensors = [t for t in tree_iter(args[place]) if isinstance(t, Tensor)]
            self.payload[kind] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def peak_of_step(make: Callable[[], Callable[[], None]], before: int, times: int) -> int:
    """Measure the most bytes in use during a step: those before it plus those it adds.

    The bytes before it come from malloc, since threads of gloo free memory unseen by the profiler;
    those it adds from the profiler, as the least of several steps, for the same reason.

    Args:
        make: prepares the step; memory that it keeps counts too.
        before: steps until all lasting memory is allocated.
        times: steps to measure.
    """
    gc.collect()
    empty = _in_use()
    action = make()
    for _ in range(before):
        action()
    gc.collect()
    there = _in_use() - empty
    added = []
    for _ in range(times):
        # Garbage is not memory that a step needs.
        gc.collect()
        with profile(profile_memory=True, use_cpu=True) as found:
            action()
        events = found.kineto_results.events()  # type: ignore[union-attr]
        sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        added.append(max(itertools.accumulate(size for _, size in sizes)))
    return there + min(added)


class _Malloc(ctypes.Structure):
    """Layout of glibc's struct mallinfo2."""

    _fields_: ClassVar = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def _in_use() -> int:
    """Bytes in use in malloc's main arena and its mappings."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Malloc
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)
