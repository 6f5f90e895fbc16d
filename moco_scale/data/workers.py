"""The processes that prepare batches: started once, silent, and never left behind."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from math import prod
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from moco_scale.errors import UserError

Batch = TypeVar("Batch")


class Failure(NamedTuple):
    """Stands in for a batch, so that a UserError arrives without the worker's traceback."""

    message: str


def batch_memory(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8; in a worker, shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


class BatchLoader(Iterator[Batch], Generic[Batch]):
    """`dataset[job]`, a whole batch, for each of the jobs in order, once.

    The workers start with the first batch. `close`, also done on leaving a `with` block, after the
    last batch and after an error, ends them. Raises UserError where the data set does, or gives a
    Failure, and when a worker died.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        jobs: Sampler[Any],
        num_workers: int,
        start_method: str | None = None,
    ) -> None:
        """`start_method` of the workers: "fork" where there is one, by default."""
        self._length = len(jobs)  # type: ignore[arg-type]
        # More decoders than cores is the default on small machines, and does no harm.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=jobs,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_set_up_worker,
            generator=torch.Generator(),  # or it would draw a seed from the global one
            multiprocessing_context=_context(start_method) if num_workers else None,
        )
        self._batches: Any = None
        self._closed = False

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            if self._batches is None:
                self._batches = _start(self._loader)
            batch = next(self._batches)
        except RuntimeError as error:
            how = _deaths(self._batches)
            self.close()
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads pictures died ({how or str(error).strip()}). Most often the "
                "machine is out of memory, or its shared memory (/dev/shm) is too small, or a "
                "shard was changed while it was read; a lower --num-workers needs less memory"
            ) from error
        except BaseException:  # the end is one of them
            self.close()
            raise
        if isinstance(batch, Failure):
            self.close()
            raise UserError(batch.message)
        return batch

    def close(self) -> None:
        """End the workers; there are no batches afterwards. May be called again."""
        self._closed = True
        batches, self._batches = self._batches, None
        # Dropping the iterator would do, were it not kept alive by a traceback now and then.
        stop = getattr(batches, "_shutdown_workers", None)
        if stop is not None:
            stop()

    def __enter__(self) -> BatchLoader[Batch]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _unchanged(batch: Any) -> Any:
    return batch


def _context(start_method: str | None) -> Any:
    # Forked workers start at once and share the index. They never touch the GPU or the network,
    # whose libraries do not survive a fork.
    if start_method is None:
        start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    return multiprocessing.get_context(start_method)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers, without DataLoader's handler of SIGCHLD.

    That one raises in the middle of whatever the main process is doing, be it saving a checkpoint.
    A dead worker is noticed all the same, when its batch is due.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    return batches


def _deaths(batches: Any) -> str:
    """How workers ended that should not have, e.g. "process 4242: SIGKILL"."""
    ends = []
    for worker in getattr(batches, "_workers", []):
        code = worker.exitcode
        if code:
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            ends.append(f"process {worker.pid}: {how}")
    return ", ".join(ends)


def _set_up_worker(worker: int) -> None:
    # Whoever stops the run (Ctrl-C, Slurm) signals the whole group. The main process decides what
    # to do about it, and may want to finish its step; it ends the workers itself, and they end on
    # their own within seconds when it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report_unless_alone


def _report_unless_alone(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Errors in a worker reach the main process; what is left is the thread that sends memory.

    It fails when the main process is gone, about which nobody needs to hear from every worker.
    """
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
