"""Processes and collectives: with ``rendezvous`` the only file that calls ``torch.distributed``.

Every helper also works in a single process without a process group, so that callers need not
ask. Tensors on a GPU travel over NCCL, tensors on the CPU over gloo.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from moco_scale.distributed.launchers import complete_environment, gpu_of, why_not_met
from moco_scale.distributed.network_interface import name_interface
from moco_scale.distributed.rendezvous import meet
from moco_scale.utils.allocator import keep_freed_memory
from moco_scale.utils.errors import RankError, UserError, first_line
from moco_scale.utils.log import log

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective, without the watchdog
MEETING = timedelta(minutes=10)
"""Time that a process waits for the last one, or for rank 0, at the start."""

LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"

# Renamed in torch 2.14, where the older name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Public since torch 2.14, which warns about the older name.
_set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout


def initialize(device: str = "auto", hang_timeout: float = 0.0) -> None:
    """Join the process group that the launcher's environment describes.

    Understands the launchers of ``launchers.complete_environment``; without one, a single process.

    Args:
        device: ``"auto"`` (CUDA when there is one), ``"cuda"`` or ``"cpu"``.
        hang_timeout: seconds after which a :class:`observe.watchdog.Watch` ends a run; the timeout
            of the collectives, whose message says less, comes later.

    Raises:
        UserError: CUDA is asked for and absent, there are more processes than GPUs here, the
            environment does not say which process this is, or the others cannot be reached.
    """
    if dist.is_initialized():
        return
    place = complete_environment(os.environ)
    name_interface(os.environ)
    local = gpu_of(place, torch.cuda.device_count())
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda:
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
        if local is None:
            problem = UserError(
                f"local rank {place.local_rank} has no GPU of its own: this process sees "
                f"{torch.cuda.device_count()}; start at most one process per GPU"
            )
            raise RankError(problem, int(os.environ["RANK"]))
        os.environ.setdefault(LAUNCH_ORDER, "1")
        torch.cuda.set_device(local)
    else:
        # Otherwise DeepSpeed looks for an accelerator and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    global _device, _store, _timeout
    _device = torch.device("cuda", local or 0) if use_cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if hang_timeout:
        _timeout = max(TIMEOUT, timedelta(seconds=1.1 * slow_timeout(hang_timeout)))
    if os.environ["WORLD_SIZE"] == "1":
        # Nobody to meet, and no port that another program could hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        _store = meet(os.environ, MEETING)
        _store.set_timeout(TIMEOUT)
        met = dist.PrefixStore("default_pg", _store)
        dist.init_process_group(backend, timeout=_timeout, store=met, rank=number, world_size=world)
    except UserError as error:
        raise RankError(error, number) from error
    except RuntimeError as error:
        why = why_not_met(os.environ, first_line(error))
        if why is None:
            raise
        raise RankError(UserError(why), number) from error
    log.debug(f"rank {number} of {world} is {socket.gethostname()}'s process on {_device}")


def have_met() -> bool:
    """Tell whether this process is in a process group, whose members share their errors."""
    return dist.is_initialized()


def shutdown() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


_device = torch.device("cpu")
_store: Any = None
_timeout = TIMEOUT


def time_out() -> float:
    """Timeout of a collective in seconds."""
    return _timeout.total_seconds()


def slow_timeout(hang_timeout: float) -> float:
    """Timeout of slow phases (start, compile, evaluation, save) in seconds."""
    return max(TIMEOUT.total_seconds(), 3 * hang_timeout)


def side_store(purpose: str) -> Any:
    """Open a separate connection to the key-value store where the processes met.

    The store lives with rank 0, or with torchrun on its host, apart from all collectives. For
    several processes only.
    """
    return dist.PrefixStore(purpose, _store.clone())


def flight_record() -> bytes | None:
    """Return torch's record of the last collectives, for ``torchfrtrace``; None without one."""
    from torch._C import _distributed_c10d

    gpu = "_dump_nccl_trace" if _device.type == "cuda" else "_dump_fr_trace"
    dump = getattr(_distributed_c10d, gpu, None)
    return None if dump is None else dump()


def launches_in_order() -> bool:
    """Tell whether every GPU starts the collectives of several groups in the order of the program.

    A collective occupies a GPU until all ranks have reached it. Two of different groups could
    deadlock if two GPUs started them in different orders, which streams do not prevent. NCCL keeps
    the order since 2.26 (``NCCL_LAUNCH_ORDER_IMPLICIT``, which :func:`initialize` sets to 1),
    provided that all processes launch them in the same order, as this program does. gloo's wait in
    threads and cannot deadlock.
    """
    if _device.type != "cuda" or world_size() == 1:
        return True
    return torch.cuda.nccl.version() >= (2, 26) and os.environ.get(LAUNCH_ORDER, "0") != "0"


def device() -> torch.device:
    """Device this process computes on."""
    return _device


def rank() -> int:
    """Rank of this process in the job."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_per_node() -> int:
    """Processes on each host, from the launcher, else from hosts' names; all ranks call it.

    Raises:
        UserError: hosts hold different numbers of processes.
    """
    found = gather_objects((os.environ.get("LOCAL_WORLD_SIZE"), socket.gethostname()))
    hosts = [host for _, host in found]
    sizes = [int(said) if said else hosts.count(host) for said, host in found]
    for number, (size, host) in enumerate(zip(sizes, hosts, strict=True)):
        if size != sizes[0] or world_size() % size:
            raise UserError(
                f"hosts hold different numbers of processes: {sizes[0]} on {hosts[0]} (rank 0), "
                f"{size} on {host} (rank {number}), {world_size()} in all"
            )
    return sizes[0]


def is_main() -> bool:
    """True on rank 0, which prints and writes."""
    return rank() == 0


main_log = log.getChild("main")
"""For messages that every process would have, and rank 0 logs for all."""
main_log.addFilter(lambda _: is_main())


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        # A CPU all-reduce: unlike dist.barrier it never has to guess a GPU.
        dist.all_reduce(torch.zeros(1))


def all_gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of every rank, in rank order.

    Args:
        rows: [n, ...] with the same shape and dtype on every rank.

    Returns:
        [world * n, ...]
    """
    if world_size() == 1:
        return rows
    rows = rows.contiguous()
    out = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    _all_gather(out, rows)
    return out


def reduce_scatter_rows(rows: Tensor) -> Tensor:
    """Sum rows over the ranks and scatter them in rank order.

    Args:
        rows: [world * n, ...] with the same shape and dtype on every rank.

    Returns:
        [n, ...]
    """
    if world_size() == 1:
        return rows
    out = rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))
    _reduce_scatter(out, rows.contiguous())
    return out


def all_gather_uneven_rows(rows: Tensor) -> Tensor:
    """Gather like :func:`all_gather_rows` from ranks with different numbers of rows.

    Args:
        rows: [n_r, ...]; n_r may differ between ranks and may be 0.

    Returns:
        [sum of n_r, ...] in rank order.
    """
    if world_size() == 1:
        return rows
    count = torch.tensor([rows.shape[0]], dtype=torch.int64)
    counts = all_gather_rows(count).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    gathered = all_gather_rows(padded).reshape(world_size(), *padded.shape)
    return torch.cat([each[:n] for each, n in zip(gathered, counts, strict=True)])


class PendingRows:
    """Rows on their way here; :meth:`wait` returns them."""

    def __init__(self, rows: Tensor, work: Any, sent: Tensor | None) -> None:
        self._rows, self._work, self._sent = rows, work, sent

    def wait(self) -> Tensor:
        """Wait for the rows and return them."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        return self._rows


def start_exchange_rows(
    rows: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Subgroup | None = None,
) -> PendingRows:
    """Start an all-to-all with uneven splits.

    Args:
        rows: [sum(send_counts), ...], the rows for rank 0 first, then those for rank 1, ...
        send_counts: rows for each rank.
        receive_counts: rows from each rank.
        group: of the ranks meant; all of them by default.

    Returns:
        A handle whose ``wait()`` gives [sum(receive_counts), ...], those of rank 0 first.
    """
    if world_size() == 1:
        return PendingRows(rows, None, None)
    rows = rows.contiguous()
    out = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    splits = list(receive_counts), list(send_counts)
    handle = group.handle if group else None
    work = dist.all_to_all_single(out, rows, *splits, group=handle, async_op=True)
    return PendingRows(out, work, rows)


def gather_rows_on_main(row: Tensor) -> Tensor | None:
    """Gather rows in rank order on rank 0; None elsewhere: [1, ...] on the CPU -> [world, ...]."""
    if world_size() == 1:
        return row
    rows = [torch.empty_like(row) for _ in range(world_size())] if is_main() else None
    dist.gather(row.contiguous(), rows)
    return None if rows is None else torch.cat(rows)


def hosts() -> list[str]:
    """Gather the host name of every rank; all ranks call it."""
    return gather_objects(socket.gethostname())


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the ranks, in place, in one message."""
    tensors = [t for t in tensors if t.is_floating_point()]
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    offset = 0
    with torch.no_grad():
        for t in tensors:
            t.copy_(flat[offset : offset + t.numel()].view_as(t))
            offset += t.numel()


def sum_(tensor: Tensor, group: Any = None) -> Tensor:
    """Sum a tensor over the ranks (of a group), in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def start_max(tensor: Tensor) -> Any:
    """Start to replace a tensor by its maximum over the ranks; the result has a ``wait()``.

    Returns None in a single process.
    """
    if world_size() == 1:
        return None
    return dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's values to every rank, in place."""
    if world_size() > 1:
        for t in tensors:
            dist.broadcast(t.detach(), src=0)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value, a small picklable object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def side_group() -> Any:
    """Make a gloo group of all ranks for a thread beside the training loop.

    Its messages cannot mix with the loop's. Every rank calls it; None in a single process.
    """
    return dist.new_group(backend="gloo", timeout=_timeout) if world_size() > 1 else None


def gather_objects(value: T, group: Any = None) -> list[T]:
    """Gather every rank's small picklable object, in rank order.

    Args:
        value: this rank's.
        group: of :func:`side_group`; the default is for the main thread.
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def adopt_groups() -> None:
    """Set this program's timeout in the groups that libraries, such as engines, have made.

    Theirs is torch's default, which may be shorter than the time that a
    :class:`~moco_scale.observe.watchdog.Watch` gives a rank.
    """
    for group in list(distributed_c10d._world.pg_map):
        _set_timeout(_timeout, group)


@dataclass(frozen=True)
class Subgroup:
    """Group of ranks."""

    handle: Any
    size: int


def neighbours(size: int) -> Subgroup:
    """Make the group of ``size`` consecutive ranks this rank belongs to.

    Every rank must call it, in the same order relative to other calls. Each makes its own group
    only, and waits for its neighbours only.

    Raises:
        ValueError: ``size`` does not divide the number of ranks.
    """
    world = world_size()
    if size < 1 or world % size:
        raise ValueError(f"blocks of {size} ranks do not tile {world} ranks")
    if size == world:
        return Subgroup(None, size)
    start = rank() // size * size
    return Subgroup(_group_of(range(start, start + size)), size)


def host_group() -> Subgroup:
    """Make the group of ranks on this rank's host; every rank must call it."""
    names = hosts()
    ranks = [number for number, name in enumerate(names) if name == names[rank()]]
    return Subgroup(_group_of(ranks) if len(ranks) < len(names) else None, len(ranks))


def _group_of(ranks: Sequence[int]) -> Any:
    """Make a group of this rank and others; only its members need to call it."""
    return dist.new_group(list(ranks), timeout=_timeout, use_local_synchronization=True)


def gather_stack(tensor: Tensor, group: Subgroup) -> Tensor:
    """Stack a tensor of every rank of a group, in rank order: [size, *tensor.shape]."""
    out = tensor.new_empty((group.size, *tensor.shape))
    _all_gather(out, tensor.contiguous().unsqueeze(0), group=group.handle)
    return out
