"""Worker processes that prepare batches: started once, silent, and never left behind."""

from __future__ import annotations

import atexit
import copy
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from multiprocessing import connection
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from moco_scale.data.remote.prefetch import FetchAhead
from moco_scale.utils.errors import ReaderLost, UserError, open_files_advice
from moco_scale.utils.own_folders import PASSING, remove_passing
from moco_scale.utils.worker_process import NOT_SENT, Flag, set_up_worker

Batch = TypeVar("Batch")
PREFETCHED = 2
"""Batches that each worker has in hand or ready."""

_END_SECONDS = 5.0  # for the end of a process to be seen after its connection has broken
_GRACE = 5.0  # seconds for workers to end by themselves
_SOCKET_PATH = 107  # bytes that the name of a socket may have
_LISTENER = "/pymp-xxxxxxxx/listener-xxxxxxxx"  # as multiprocessing names its own in TMPDIR


class Failure(NamedTuple):
    """Stands in for a batch, so that a UserError arrives without the worker's traceback."""

    message: str


def batch_memory(shape: tuple[int, ...]) -> Tensor:
    """Allocate uint8; in a worker, shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


class Places(Protocol):
    """Places of samples, for messages."""

    def where(self, i: int) -> str:
        """Name the place of sample i."""

    def fault(self, i: int) -> str | None:
        """Describe damage of sample i's file, or None."""


class Reading:
    """Current sample of each worker, in memory that outlives the worker.

    Args:
        places: of the samples.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self._samples = torch.empty(0, dtype=torch.int64)

    def share(self, num_workers: int) -> None:
        """Allocate for so many workers, before they start."""
        self._samples = torch.full((num_workers,), -1, dtype=torch.int64).share_memory_()

    def begin(self, sample: int) -> None:
        """Record the sample that this worker starts to read; -1: none."""
        info = get_worker_info()
        if info is not None:
            self._samples[info.id] = sample

    def of(self, worker: int) -> int | None:
        """Return a worker's current sample, None for none."""
        sample = int(self._samples[worker])
        return None if sample < 0 else sample


class BatchLoader(Iterator[Batch], Generic[Batch]):
    """Yields `dataset[job]`, a whole batch, for each of the jobs in order.

    The workers start with the first batch. `close` ends them; it is also called on leaving a `with`
    block, after the last batch and after an error.

    Raises:
        UserError: The data set raises one or gives a Failure, or a worker died.
        ReaderLost: A worker was killed, by nobody's mistake.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        jobs: Sampler[Any],
        num_workers: int,
        start_method: str | None = None,
        reading: Reading | None = None,
        ahead: FetchAhead | None = None,
        finish: Callable[[Any], Batch] | None = None,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare workers, without starting them.

        Args:
            dataset: makes a batch of a job.
            jobs: in order.
            num_workers: processes; 0 works in this one.
            start_method: of the workers; "fork" where there is one, by default.
            reading: updated by the data set, for the message when a worker dies.
            ahead: closed with the loader.
            finish: applied by this process to each batch.
            lost: called with the reason when a worker was killed (SIGKILL); this process then reads
                the remaining batches itself, so that a run can end orderly. None: that raises.
        """
        self._dataset, self._jobs, self._given, self._lost = dataset, jobs, 0, lost
        self._reading, self._finish = reading, finish
        self._length = len(jobs)  # type: ignore[arg-type]
        self._ahead = ahead
        context = _context(start_method) if num_workers else None
        if num_workers:
            _check_room_for_sockets()
        try:
            self._no_longer = None if context is None else Flag()
        except (OSError, RuntimeError) as error:  # it takes a file
            raise _explained(error, None, None) or error from error
        # More decoders than cores is the default on small machines, and does no harm.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=jobs,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw a seed from the global one
            multiprocessing_context=context,
            prefetch_factor=PREFETCHED if num_workers else None,
        )
        self._batches: Any = None
        self._sockets = ""  # the workers' folder for them
        self._closed = False
        self._at_exit = partial(_close, weakref.ref(self))

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            batch = self._take()
            if isinstance(batch, Failure):
                raise UserError(batch.message)
            self._given += 1
            return batch if self._finish is None else self._finish(batch)  # type: ignore[no-any-return]
        except BaseException:  # the end is one of them
            self.close()
            raise

    def _take(self) -> Any:
        try:
            if self._batches is None:
                if self._reading is not None:
                    self._reading.share(self._loader.num_workers)
                self._sockets = tempfile.mkdtemp(prefix="pymp-")
                PASSING.add(self._sockets)
                self._batches = _start(self._loader, self._no_longer, self._sockets)
                # Who is interrupted between two batches may leave without closing. Registered
                # after the workers, so that it comes before multiprocessing waits for them.
                atexit.register(self._at_exit)
            return next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            met = _explained(error, self._batches, self._reading)
            if met is None:
                raise
            if not isinstance(met, ReaderLost) or self._lost is None:
                raise met from error
            self._lost(str(met))
        self._end_workers()
        rest = itertools.islice(iter(self._jobs), self._given, None)
        self._batches = (self._dataset[job] for job in rest)
        return next(self._batches)

    def close(self) -> None:
        """End the workers; there are no more batches. May be called again."""
        self._closed = True
        atexit.unregister(self._at_exit)
        self._end_workers()
        if self._ahead is not None:
            self._ahead.close()

    def _end_workers(self) -> None:
        if self._no_longer is not None:
            self._no_longer.set()
        batches, self._batches = self._batches, None
        # Dropping the iterator would do, were it not kept alive by a traceback now and then.
        stop = getattr(batches, "_shutdown_workers", None)
        if stop is not None:
            # One that is stopped, or waits for a disk, would be waited for; none heeds SIGTERM.
            late = threading.Timer(_GRACE, _kill, [batches._workers])
            late.daemon = True
            late.start()
            try:
                stop()
            finally:
                late.cancel()
                _end(batches._workers)
        remove_passing({self._sockets})

    def __enter__(self) -> BatchLoader[Batch]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _end(workers: Sequence[Any]) -> None:
    _kill(workers)
    for worker in workers:
        worker.join(_END_SECONDS)


def _check_room_for_sockets() -> None:
    """Check TMPDIR, where workers have sockets: too long a name hangs them."""
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"there is no folder for temporary files ({why}): set TMPDIR") from None
    room = _SOCKET_PATH - len(_LISTENER)
    if len(os.fsencode(folder)) > room:
        raise UserError(
            f"TMPDIR, {folder}, is too long a name: processes that read images have sockets in "
            f"it, for which it may have {room} bytes. Choose another, such as TMPDIR=/tmp"
        )


def _close(loader: weakref.ref[BatchLoader[Any]]) -> None:
    alive = loader()
    if alive is not None:
        alive.close()


def _unchanged(batch: Any) -> Any:
    return batch


def _context(start_method: str | None) -> Any:
    # Forked workers start at once and share the index. They never touch the GPU or the network,
    # whose libraries do not survive a fork.
    if start_method is None:
        start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = copy.copy(multiprocessing.get_context(start_method))
    # torch asks the one that it makes for each batch, in its workers and in this process.
    context.Event = Flag  # type: ignore[method-assign, assignment]
    return context


def _start(loader: DataLoader[Any], no_longer: Any, sockets: str) -> Iterator[Any]:
    """Start the workers, without DataLoader's handler of SIGCHLD.

    That handler raises in the middle of anything the main process is doing, such as saving a
    checkpoint. A dead worker is noticed when its batch is due.
    """
    if not loader.num_workers:
        return iter(loader)
    known = set(multiprocessing.active_children())
    in_main = threading.current_thread() is threading.main_thread()
    # The kernel takes the end of the thread that starts a process for that of its parent.
    parent = os.getpid() if in_main else None
    loader.worker_init_fn = partial(set_up_worker, no_longer, parent)
    handler = signal.getsignal(signal.SIGCHLD)
    # One folder of ours in the place of one of each worker's, which a killed one would leave.
    inherited = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = inherited.get("tempdir")
    inherited["tempdir"] = sockets
    batches = object.__new__(_MultiProcessingDataLoaderIter)
    try:
        batches.__init__(loader)  # type: ignore[misc]
        return batches
    except BaseException:  # some may have started; it cannot end what it does not yet know of
        batches._shutdown = True
        _end([child for child in multiprocessing.active_children() if child not in known])
        raise
    finally:
        inherited["tempdir"] = before
        if in_main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _explained(
    error: RuntimeError | OSError | EOFError, batches: Any, reading: Reading | None
) -> UserError | None:
    """Convert an error of the machinery to a user's; None for one of the program's own."""
    text = str(error)
    # The second is what is left of it when a file descriptor could not be received.
    if "Too many open files" in text or "ancdata" in text:
        return UserError(f"Too many files are open for reading images. {open_files_advice()}")
    if isinstance(error, BlockingIOError) or "Resource temporarily unavailable" in text:
        return UserError(
            "No more processes can be started for reading images: `ulimit -u`, or the limit of "
            "the job's or container's processes, is too low; raise it or use a lower --num-workers"
        )
    # The latter two: it died with a batch sent but not yet handed over.
    noticed = "DataLoader worker" in text and "exited unexpectedly" in text
    if batches is not None and (noticed or isinstance(error, ConnectionError | EOFError)):
        _wait_for_an_end(batches._workers)
        return _deaths(batches, reading)
    if "No space left on device" in text:
        return UserError(f"Batches travel through shared memory. {_shared_memory_advice()}")
    return None


def _wait_for_an_end(workers: Sequence[Any]) -> None:
    by_sentinel = {worker.sentinel: worker for worker in workers}
    for sentinel in connection.wait(list(by_sentinel), _END_SECONDS):
        # It closes its files a moment before it can be asked for its status.
        by_sentinel[sentinel].join(_END_SECONDS)  # type: ignore[index]


def _deaths(batches: Any, reading: Reading | None) -> UserError | None:
    """Describe how workers ended, what each was reading, and the likely cause.

    None when all ended orderly; ReaderLost when they were killed without a known cause.
    """
    ends, advice, killed = [], "", True
    for number, worker in enumerate(getattr(batches, "_workers", [])):
        code = worker.exitcode
        if not code:
            continue
        if code > NOT_SENT:
            why = os.strerror(code - NOT_SENT)
            fix = {
                errno.EMFILE: open_files_advice(),
                errno.ENFILE: open_files_advice(),
                errno.ENOSPC: _shared_memory_advice(),
            }.get(code - NOT_SENT, "See above")
            return UserError(f"a process that reads images cannot hand them over: {why}. {fix}")
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        sample = None if reading is None else reading.of(number)
        place = ""
        if reading is not None and sample is not None:
            place = f", while reading sample {sample}, {reading.places.where(sample)}"
        ends.append(f"process {worker.pid}: {how}{place}")
        fault = None if reading is None or sample is None else reading.places.fault(sample)
        killed = killed and code == -signal.SIGKILL and fault is None
        advice = advice or _advice(-code, fault, sample is not None)
    if not ends:
        return None
    kind = ReaderLost if killed else UserError
    return kind(f"a process that reads images died ({'; '.join(ends)}). {advice}")


def _advice(number: int, fault: str | None, reading: bool) -> str:
    if fault is not None:
        return fault
    if number == signal.SIGBUS:
        return (
            "Its shared memory is full, or a disk failed under a shard that is mapped: see "
            f"`dmesg`. {_shared_memory_advice()}"
        )
    if number == signal.SIGKILL:
        return (
            "Most often the machine, or the job's share of it, is out of memory: a lower "
            "--num-workers needs less"
        )
    again = ", and `python -m moco_scale shard --check DIR` if it happens there again"
    return (
        "Most often the machine is out of memory (a lower --num-workers needs less), or a "
        f"library has failed: start again{again if reading else ''}"
    )


def _shared_memory_advice() -> str:
    try:
        free = f", where {shutil.disk_usage('/dev/shm').free / 1e6:.0f} MB are free now,"
    except OSError:
        free = ""
    return (
        f"Make room in /dev/shm{free} (in a container: --shm-size), or use a lower --num-workers "
        "or --batch-size"
    )
