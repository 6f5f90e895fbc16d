"""Pool of processes, with results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from moco_scale.utils.parents import die_with

Task = TypeVar("Task")
Result = TypeVar("Result")


def core_count() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result; `workers` processes work ahead, or this one.

    Raises the errors of `work`, and BrokenProcessPool when a worker was killed.
    """
    if workers <= 1:
        for task in tasks:
            yield task, work(task)
        return
    # Forked, so that the workers need not import everything again; they run no torch.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(threading.current_thread() is threading.main_thread(),),
    )
    pending: deque[tuple[Task, Future[Result]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(work, task)))
            if len(pending) > 4 * workers:  # tasks may be large: not all at once
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(in_main_thread: bool) -> None:
    """Ignore interrupts, which the main process handles; end when it is gone."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)  # the main process's
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    if in_main_thread:
        die_with(parent.pid)

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


__all__ = ["BrokenProcessPool", "core_count", "in_order"]
