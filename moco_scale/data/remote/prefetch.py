"""Prefetch of shards into the cache: one process for each machine and loader.

It walks the run's plan ahead of the current step, as far as the cache has room, and fetches missing
shards in the order of need. It only saves time: readers fetch missing shards themselves, and report
failures.

It is a process of its own, because fetching would otherwise compete with the training loop for
Python's lock, and because threads do not survive the forks that make readers. It ends with its
parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import moco_scale
from moco_scale.data.remote.download import RemoteFile
from moco_scale.data.remote.shard_cache import NoRoom, ShardCache, gigabytes, shard_path
from moco_scale.data.remote.store import Store
from moco_scale.data.sampling.order import BatchPlan, Indices, Plan
from moco_scale.data.sampling.windows import window_of
from moco_scale.utils.errors import UserError, processes_advice
from moco_scale.utils.log import log, outlive_terminal, show_from
from moco_scale.utils.parents import die_with

_FETCHERS = 4
_REST = 30.0  # seconds for which a shard that cannot be had is left to those who read it
_RESTARTS_APART = 60.0  # seconds, where the process dies again and again
_END = b"end\n"
# Whoever stops the run signals the whole group; to the process, the end of stdin is what counts.
_NOT_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
NOWHERE = np.uint32(2**32 - 1)


class RemotePart(NamedTuple):
    """Range of a data set that lies in remote shards."""

    first: int
    """Position of its first sample in the data set."""
    shard_of: npt.NDArray[np.uint32]
    """uint32 [n], the shard of each of its samples; NOWHERE for those of other parts."""
    files: Sequence[RemoteFile]
    store: Store
    folder: Path
    """Folder of the cache for this set."""
    cache: ShardCache

    @property
    def shards(self) -> npt.NDArray[np.uint32]:
        """List the shards with samples."""
        used = np.unique(self.shard_of)
        return used[used != NOWHERE]

    def chosen(self, places: Indices) -> RemotePart:
        """Select a subset of the whole data set: int64 [M] places in it."""
        inside = (places >= self.first) & (places < self.first + len(self.shard_of))
        shard_of = np.full(len(places), NOWHERE)
        shard_of[inside] = self.shard_of[places[inside] - self.first]
        return self._replace(first=0, shard_of=shard_of)


class Job(NamedTuple):
    """Shards to fetch, and when."""

    parts: list[RemotePart]
    plan: Plan
    start: int
    """First step that will be read."""
    end: int
    """The step after the last."""
    in_flight: int
    """Steps that are being read at the same time, at most."""
    spare: int | None = None
    """Shards to hold ready besides those of the steps in flight; None: all that there is room
    for. For who reads beside a run that needs the room."""


class FetchAhead:
    """Prefetch process, seen from the training process.

    A killed one is replaced, and this is logged once: it costs only time.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._said, self._not_before = job, False, 0.0
        try:
            self._start(job)
        except BlockingIOError:
            raise UserError(processes_advice("process")) from None

    def _start(self, job: Job) -> None:
        root = str(Path(moco_scale.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        in_main = threading.current_thread() is threading.main_thread()
        parent, level = str(os.getpid() if in_main else 0), logging.getLevelName(log.level)
        # What the whole group gets would end it, with a traceback, before it can ignore that.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import main; main()", parent, level],
                stdin=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        pipe = self._process.stdin
        assert pipe is not None
        self._pipe = pipe
        with contextlib.suppress(BrokenPipeError):  # it cannot start: then without it
            pickle.dump(job, pipe)
            pipe.flush()
        os.set_blocking(pipe.fileno(), False)

    def at(self, step: int) -> None:
        """Announce that readers begin with this step."""
        status = self._process.poll()
        if status and time.monotonic() >= self._not_before:
            self._replace(status, step)
        self._say(b"%d\n" % step)

    def close(self) -> None:
        """End the process. May be called again."""
        if self._process.poll() is None:
            self._say(_END)
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(OSError):
            self._pipe.close()

    def _replace(self, status: int, step: int) -> None:
        if not self._said:
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            log.warning(
                f"the process that fetches shards ahead died ({how}; most often for want of "
                "memory) and is started again; until then readers fetch for themselves"
            )
        self._said, self._not_before = True, time.monotonic() + _RESTARTS_APART
        self.close()
        with contextlib.suppress(OSError):  # of Popen; it is tried again
            self._start(self._job._replace(start=step))

    def _say(self, line: bytes) -> None:
        # Lost when it is gone or too busy to listen: the next one will do.
        with contextlib.suppress(OSError, ValueError):
            os.write(self._pipe.fileno(), line)


def check_room(parts: Sequence[RemotePart], plan: BatchPlan, in_flight: int) -> None:
    """Check that the caches hold the shards that a run reads at a time. Raises UserError."""
    for cache in {part.cache for part in parts}:
        needed = sum(_needed(part, plan, in_flight) for part in parts if part.cache == cache)
        if needed > cache.limit:
            raise UserError(
                f"--shard-cache-size {gigabytes(cache.limit)} is too small for what is read at a "
                f"time: it takes {gigabytes(needed)} at least. Give it more, or lower "
                "--shuffle-window"
            )


def _needed(part: RemotePart, plan: BatchPlan, in_flight: int) -> int:
    """Bytes of the shards that are read at a time.

    These are the window, the shards it passes while the steps in flight are read, and one being
    fetched.
    """
    used, samples = part.shards, int((part.shard_of != NOWHERE).sum())
    sizes = sorted((part.files[shard].bytes or 0 for shard in used), reverse=True)
    rolled = -(-plan.global_batch * in_flight * len(used) // max(samples, 1))
    return sum(sizes[: (window_of(plan.order) or len(used)) + rolled + 1])


class Lookahead:
    """Shards that the next steps need, in the order of need, as far as there is room.

    A shard is named by (part, number in the part).
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._horizon = job.start  # the first step that was not looked at
        self._last_need: dict[tuple[int, int], int] = {}  # in the order of the first need
        self._room = min(part.cache.limit for part in job.parts)
        if job.spare is not None:
            first = range(job.start, min(job.end, job.start + job.in_flight + 1))
            shards = {shard for step in first for shard in self._needs(step)}
            largest = max(file.bytes or 0 for part in job.parts for file in part.files)
            self._room = min(self._room, sum(map(self._bytes, shards)) + job.spare * largest)

    def advance(self, step: int) -> None:
        """Continue at `step`, with as many steps before it in flight as there may be."""
        done = step - self._job.in_flight
        for shard in [s for s, last in self._last_need.items() if last < done]:
            del self._last_need[shard]
            self._room += self._bytes(shard)
        self._horizon = max(self._horizon, step)
        while self._horizon < self._job.end:
            needs = list(self._needs(self._horizon))
            size = sum(self._bytes(shard) for shard in needs if shard not in self._last_need)
            if size > self._room:
                return
            self._room -= size
            self._last_need.update(dict.fromkeys(needs, self._horizon))
            self._horizon += 1

    def wanted(self) -> list[tuple[int, int]]:
        return list(self._last_need)

    def _bytes(self, shard: tuple[int, int]) -> int:
        return self._job.parts[shard[0]].files[shard[1]].bytes or 0

    def _needs(self, step: int) -> Iterator[tuple[int, int]]:
        samples = self._job.plan.batch(step).index
        for number, part in enumerate(self._job.parts):
            own = samples - part.first
            own = own[(own >= 0) & (own < len(part.shard_of))]
            for shard in np.unique(part.shard_of[own]).tolist():
                if shard != NOWHERE:
                    yield number, shard


class _Fetching:
    """Threads and their shared state."""

    def __init__(self, job: Job) -> None:
        self._parts = [
            # Readers wait for what is being fetched here: they shall soon try for themselves.
            part._replace(
                cache=dataclasses.replace(
                    part.cache,
                    retry=dataclasses.replace(
                        part.cache.retry, give_up=part.cache.retry.give_up / 10
                    ),
                )
            )
            for part in job.parts
        ]
        self._lookahead = Lookahead(job)
        self._changed = threading.Condition()
        self._busy: set[tuple[int, int]] = set()
        self._resting: dict[tuple[int, int], float] = {}
        self._lookahead.advance(job.start)
        for _ in range(_FETCHERS):
            threading.Thread(target=self._work, daemon=True).start()

    def advance(self, step: int) -> None:
        with self._changed:
            self._lookahead.advance(step)
            self._changed.notify_all()

    def _next(self) -> tuple[int, int] | None:
        now = time.monotonic()
        for shard in self._lookahead.wanted():
            number, file = shard
            part = self._parts[number]
            if (
                shard not in self._busy
                and self._resting.get(shard, 0.0) <= now
                and not part.cache.has(part.folder, part.files[file])
            ):
                return shard
        return None

    def _path(self, shard: tuple[int, int]) -> Path:
        part = self._parts[shard[0]]
        return shard_path(part.folder, part.files[shard[1]])

    def _work(self) -> None:
        while True:
            with self._changed:
                while (shard := self._next()) is None:
                    self._changed.wait(1.0)  # readers may have removed one
                self._busy.add(shard)
                keep = {self._path(other) for other in self._lookahead.wanted()}
            part = self._parts[shard[0]]
            try:
                part.cache.fetch(part.store, part.folder, part.files[shard[1]], keep=keep)
            except NoRoom:
                with self._changed:
                    self._busy.discard(shard)
                    self._changed.wait(1.0)
            except (UserError, OSError):
                self._resting[shard] = time.monotonic() + _REST
            finally:
                self._busy.discard(shard)


def main() -> None:
    """Run the process: a job, then a line for each step, on stdin."""
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    outlive_terminal()
    show_from(sys.argv[2])
    if parent := int(sys.argv[1]):
        die_with(parent)
    stdin = io.BufferedReader(io.FileIO(0))
    try:
        fetching = _Fetching(pickle.load(stdin))
    except UserError:  # which readers will meet too
        os._exit(0)
    for line in stdin:
        if line == _END:
            break
        fetching.advance(int(line))
    os._exit(0)
