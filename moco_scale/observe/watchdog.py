"""Watchdog: finds a run that hangs, names the rank and the place, and ends the run.

Each rank has two threads beside its training loop. One sends heartbeats to the key-value store
where the processes met, over plain TCP and not over the path of the collectives, and reads rank
0's. The other counts how long its own rank has been idle. All ranks wait for each other in every
step, so where one is stuck all soon are, rank 0 too. Then rank 0 alone reads all heartbeats and
posts its verdict; where rank 0 is silent, the first rank of every host does. To end a run, the
threads need no answer from the training loop, a GPU or the store.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from moco_scale.distributed import collectives
from moco_scale.observe.heartbeats import Heartbeat, LastSeen, place, silent, standing, waited_for
from moco_scale.observe.phases import Phases
from moco_scale.untrusted.documents import DocumentError
from moco_scale.untrusted.store_message import Verdict, parse_verdict
from moco_scale.utils.errors import (
    LOST_PEER,
    PeerLost,
    RankError,
    StoppedEarly,
    UserError,
    first_line,
    is_peer_gone,
)
from moco_scale.utils.log import log
from moco_scale.utils.own_folders import remove_passing
from moco_scale.utils.parents import children
from moco_scale.utils.progress import progress_count
from moco_scale.utils.text import printable_lines

_RANKS_PER_SECOND = 400  # heartbeats that rank 0's store gets, at most, where ranks are many
_HEARTBEATS = 20  # in a timeout, at least
_ROUNDS = 3  # of reading all heartbeats before a rank is called missing
_LAST_SECONDS = 10.0  # for each thing done before the end
_LONGEST_TEXT = 10_000
_LISTED = 6
_STATES = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits for a disk"}
_VERDICT, _SEEN, _ALARM = "verdict", "seen", "alarm"


class Watch:
    """Watches a run on this rank for as long as the ``with`` block lasts.

    When no rank makes progress for `timeout` seconds, or a rank dies unnoticed, every rank that
    can prints which rank is missing and where, writes stacks of its threads and torch's flight
    recorder below `folder`, and ends with :data:`LOST_PEER`. A network error that ends the block
    is raised as :class:`PeerLost`, with the same explanation. A single process has no store and
    sends no heartbeats; when it hangs it is ended all the same, and its message has the state of
    its reader processes.

    Heartbeats go out every second, or twenty times in `timeout` where that is more often; with
    more than 400 ranks, one second apart for every 400 ranks (2,048: 5 s). That is three small
    requests per rank, 1,200 a second for the store. While the run hangs, rank 0 adds one request
    for all heartbeats.

    Args:
        phases: position of this rank.
        timeout: seconds, at least those of twenty heartbeats; 0 disables the watchdog.
        folder: for stacks and flight records.
        program: its name, for the messages.
    """

    def __init__(self, phases: Phases, timeout: float, folder: Path, program: str) -> None:
        self._phases, self._folder, self._program = phases, folder, program
        self._rank, self._world = collectives.rank(), collectives.world_size()
        self._first_of_host = collectives.local_rank() == 0
        self._host = socket.gethostname()
        self._interval = max(min(timeout / _HEARTBEATS, 1.0), self._world / _RANKS_PER_SECOND)
        # With fewer heartbeats in it, healthy ranks would seem silent.
        self._timeout = max(timeout, _HEARTBEATS * self._interval) if timeout else 0.0
        self._closed, self._wake = threading.Event(), threading.Event()
        self._last_word = threading.Lock()  # a single thread ends the run
        self._idle = self._grace = 0.0
        self._last, self._looked = (phases.now, progress_count()), time.monotonic()
        self._count = 0
        self._last_seen: dict[int, LastSeen] = {}
        self._read_all = False
        self._full_rounds = 0  # of reading all heartbeats, since that was begun
        self._slowest = 0.0  # seconds of the longest round: the store's, and so everybody's, pace
        self._alarmed = -math.inf  # when another rank reported a network error
        self._alarm = False  # this rank has one to report
        self._answered = time.monotonic()
        self._broken = ""
        self._posting: Verdict | None = None
        self._verdict: Verdict | None = None
        self._junk, self._seen_by = False, 0

    def __enter__(self) -> Watch:
        if not self._timeout:
            self._closed.set()
            return self
        works = [self._judge]
        if self._world > 1:
            self._store = collectives.side_store("watch")
            works.append(self._exchange)
        self._answered = time.monotonic()
        for work in works:
            threading.Thread(target=work, name=f"watch {work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._closed.is_set():
            return
        self._last_word.acquire()  # never, when the other thread is ending this process
        try:
            if self._world == 1:
                return
            if isinstance(error, RuntimeError) and is_peer_gone(error):
                # The launcher stops all ranks when one has ended; name that one first.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                text = self._who_left(error)
                self._post(text)
                raise PeerLost(f"{self._me()} stops in {self._place()}: {text}") from error
            if error is not None and _is_mine(error):
                reason = str(error) if isinstance(error, UserError) else repr(error)
                self._post(f"{self._me()} ended in {self._place()}: {reason}", ended=True)
        finally:
            self._closed.set()

    def _me(self) -> str:
        return f"rank {self._rank} on {self._host}"

    def _place(self) -> str:
        return place(self._phases.now.step, self._phases.now.phase)

    # The thread that talks to the store: any call may never return, or fail for good.

    def _exchange(self) -> None:
        try:
            while not self._closed.is_set():
                self._talk()
                self._wake.wait(self._interval)
                self._wake.clear()
        except Exception as error:  # once broken, a connection of torch's store stays so
            self._broken = first_line(error)

    def _talk(self) -> None:
        begun = time.monotonic()
        self._beat()
        if self._posting is not None:
            posted, text = self._posting, self._posting.model_dump_json()
            self._verdict = self._parsed(self._store.compare_set(_VERDICT, "", text)) or posted
            self._posting = None
        elif self._verdict is None and self._store.check([_VERDICT]):
            self._verdict = self._parsed(self._store.get(_VERDICT))
            if self._verdict is not None:
                self._store.add(_SEEN, 1)
        if self._verdict is not None:
            self._seen_by = self._store.add(_SEEN, 0)
        if self._alarm:
            self._alarm = False
            self._store.set(_ALARM, str(self._rank))
        elif self._rank == 0 and self._alarmed < 0 and self._store.check([_ALARM]):
            self._alarmed = time.monotonic()
        everybody = self._read_all
        self._listen(range(self._world) if everybody else range(1))
        self._full_rounds = self._full_rounds + 1 if everybody else 0
        self._answered = time.monotonic()
        self._slowest = max(0.95 * self._slowest, self._answered - begun)

    def _parsed(self, content: bytes) -> Verdict | None:
        """Read the verdict in the store; None for one that no rank has written."""
        try:
            return parse_verdict(content)
        except DocumentError as error:
            self._say_junk(error)
            return None

    def _say_junk(self, error: DocumentError) -> None:
        if not self._junk:
            self._junk = True
            log.warning(
                f"{self._program}: {self._me()} ignores {error}: somebody else writes to the "
                "store; close its port to everybody outside the job (docs/security.md)"
            )

    def _beat(self) -> None:
        self._count += 1
        step, entry, phase, _ = self._phases.now
        device = None
        if self._idle > self._timeout / 4 and self._phases.device is not None:
            reached = self._phases.device.where()
            device = reached[:3] if reached else None
        beat = Heartbeat(
            rank=self._rank,
            host=self._host,
            count=self._count,
            clock=time.strftime("%H:%M:%S"),
            step=step,
            entry=entry,
            phase=phase,
            idle_seconds=self._idle,
            slow_phase=not self._phases.steady,
            device=device,
        )
        self._store.set(_key(self._rank), beat.encode())

    def _listen(self, ranks: range) -> None:
        known = [_key(rank) for rank in ranks if rank in self._last_seen]
        others = [_key(rank) for rank in ranks if rank not in self._last_seen]
        # Getting a missing key would wait for it.
        if others and not self._store.check(others):
            others = [key for key in others if self._store.check([key])]
        seen, now = dict(self._last_seen), time.monotonic()
        keys = known + others
        for key, text in zip(keys, self._store.multi_get(keys), strict=True):
            try:
                beat = Heartbeat.decode(text)
                if _key(beat.rank) != key:
                    raise DocumentError(f"a heartbeat of rank {beat.rank} under the key {key}")
            except DocumentError as error:
                self._say_junk(error)
                continue
            before = self._last_seen.get(beat.rank)
            same = before is not None and before.beat.count == beat.count
            seen[beat.rank] = LastSeen(beat, before.changed if before and same else now)
        self._last_seen = seen

    # The thread that decides: it never waits for the store.

    def _judge(self) -> None:
        while not self._closed.wait(self._interval) and not self._last_word.locked():
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        # Do not count time in which this process itself was stopped.
        passed, self._looked = min(now - self._looked, 3 * self._interval), now
        before, self._last = self._last, (self._phases.now, progress_count())
        self._idle = self._idle + passed if self._last == before else 0.0
        self._read_all = self._world > 1 and self._reads(now)
        text = None
        if self._verdict is not None:
            self._grace += passed
            # Another rank's error mostly ends this one by itself in a moment.
            if not self._verdict.ended or self._grace > 3 * self._interval + 2:
                text = self._verdict.text
        elif self._world == 1:
            text = self._single_process_stuck()
        elif self._idle > 0.9 * self._timeout:
            text = self._finding(now)
        elif now - self._alarmed < self._search:
            # Another rank has met a network error that this one may never meet.
            text = self._store_lost(now) or self._gone(now, self._alarmed)
        if text is not None:
            self._end(text)

    @property
    def _slow_timeout(self) -> float:
        return collectives.slow_timeout(self._timeout)

    @property
    def _search(self) -> float:
        """Seconds to find the dead rank after a network error."""
        return 8 * self._interval + 4 * self._slowest + 5

    def _reads(self, now: float) -> bool:
        """Decide whether this rank reads all heartbeats."""
        if self._idle <= self._timeout / 2:
            return now - self._alarmed < self._search
        # By then the rank that should have posted a verdict has not.
        if self._rank == 0 or self._idle > self._slow_timeout + self._timeout:
            return True
        return self._first_of_host and self._rank_0_missing(now, 0.15 * self._timeout) is not None

    def _silent(self, now: float, after: float, world: int) -> str | None:
        """Name silent ranks among the first `world`, allowing for a slow store."""
        seen = {rank: each for rank, each in self._last_seen.items() if rank < world}
        return silent(seen, world, now, max(after, 4 * self._slowest))

    def _rank_0_missing(self, now: float, after: float) -> str | None:
        return self._silent(now, after, 1)

    def _gone(self, now: float, begun: float) -> str | None:
        """Name ranks that have gone silent since a network error at `begun`."""
        if now - begun < 3 * self._interval + 1 or self._full_rounds < _ROUNDS:
            return None
        return self._silent(now, 2.5 * self._interval + 0.5, self._world)

    def _finding(self, now: float) -> str | None:
        """Explain why this rank has been idle for long; None: it may still go on."""
        lost = self._store_lost(now)
        if lost is not None:
            return lost
        after = 0.3 * self._timeout
        if not self._read_all:  # rank 0 posts the verdict, or one that reads in its place
            late = self._idle > 0.9 * self._timeout + 3 * self._interval + 4 * self._slowest
            return self._rank_0_missing(now, after) if late else None
        if self._full_rounds < _ROUNDS:
            return None
        missing = self._silent(now, after, self._world)
        if missing is not None:
            return missing
        behind, waiting = waited_for(each.beat for each in self._last_seen.values())
        if any(beat.slow_phase and beat.idle_seconds < self._slow_timeout for beat in behind):
            return None
        return standing(behind, waiting)

    def _single_process_stuck(self) -> str | None:
        """Explain why a single process hangs; None: it may still go on."""
        limit = self._timeout if self._phases.steady else self._slow_timeout
        return f"no progress{_stopped_children()}" if self._idle > limit else None

    def _store_lost(self, now: float) -> str | None:
        late = now - self._answered > max(0.3 * self._timeout, 3 * self._interval)
        if not self._broken and not late:
            return None
        if self._rank == 0:
            return f"the network of {self._host} is gone: not even this rank reaches its own store"
        how = f" ({self._broken})" if self._broken else ""
        if 0 not in self._last_seen:
            return f"rank 0, whose host keeps the store, was never seen{how}: dead or cut off"
        beat = self._last_seen[0].beat
        return (
            f"{beat.name}, whose host keeps the store, was last seen at {beat.clock}{how} "
            f"(frozen, dead or cut off) in {beat.place}"
        )

    def _who_left(self, error: RuntimeError) -> str:
        """Find the dead rank after a network error."""
        begun = now = time.monotonic()
        if self._rank == 0:
            self._alarmed = begun
        else:
            self._alarm = True
        rank_0 = None
        while now - begun < self._search and self._verdict is None:
            rank_0 = self._rank_0_missing(now, 2.5 * self._interval + 0.5)
            self._read_all = self._rank == 0 or (self._first_of_host and rank_0 is not None)
            self._wake.set()
            time.sleep(self._interval / 5)
            now = time.monotonic()
            if now - begun > 1.0:  # rank 0 may have ended because of another, and have posted it
                found = self._store_lost(now) or (self._read_all and self._gone(now, begun))
                if found:
                    return found
        if self._verdict is not None:
            return self._verdict.text
        return rank_0 or f"another process ended, or the network failed ({first_line(error)})"

    # The end.

    def _post(self, text: str, ended: bool = False) -> None:
        """Post the verdict for the other ranks, as far as they can be reached."""
        verdict = Verdict(text=text[:_LONGEST_TEXT], ended=ended, at=int(time.time()))
        if self._world == 1:
            self._verdict = verdict
            return
        if self._verdict is None:
            self._posting = verdict
        self._wait_until(lambda: self._verdict is not None, 2 * self._interval + 1)
        self._verdict = self._verdict or verdict
        if self._rank == 0:  # the store may end with this process: others read first
            everyone = self._world - 1
            self._wait_until(lambda: self._seen_by >= everyone, 3 * self._interval + 1)

    def _wait_until(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and not self._broken and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(min(self._interval, 0.1))

    def _end(self, text: str) -> NoReturn:
        self._last_word.acquire()
        line = (
            f"{self._program}: {self._me()} stops after {self._idle:.0f} s in {self._place()} "
            f"(--hang-timeout {self._timeout:g}): {text}"
        )
        line = printable_lines(line, 2 * _LONGEST_TEXT) + "\n"
        _try(_write_at_once, line)
        self._post(text)
        _try(self._write_down, line)
        for number, _ in children():  # one that is stopped does not end by itself
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        remove_passing()
        os._exit(LOST_PEER)

    def _write_down(self, line: str) -> None:
        assert self._verdict is not None
        when = time.strftime("%Y%m%d-%H%M%S", time.localtime(self._verdict.at))
        folder = self._folder / "hangs" / when
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self._rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                faulthandler.dump_traceback(file)
            trace = collectives.flight_record()
            if trace:
                (folder / f"flight_rank_{self._rank}").write_bytes(trace)


def _try(work: Callable[[str], None], line: str) -> None:
    """Do work that may hang in a terminal or file system; give up after a few seconds."""
    doing = threading.Thread(target=work, args=(line,), daemon=True)
    doing.start()
    doing.join(_LAST_SECONDS)


def _write_at_once(line: str) -> None:
    """Write past Python's buffers, whose lock the training loop may hold."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), line.encode())


def _stopped_children() -> str:
    """Name child processes that are stopped, or wait for a disk."""
    return "".join(
        f"; its child process {number} {_STATES[state]}"
        for number, state in children("TtD")[:_LISTED]
    )


def _is_mine(error: BaseException) -> bool:
    """Tell an error of this rank alone from one that all ranks raise together."""
    agreed = isinstance(error, UserError) and not isinstance(error, RankError)
    known = agreed or isinstance(error, StoppedEarly | PeerLost)
    return isinstance(error, Exception) and not known


def _key(rank: int) -> str:
    return f"beat/{rank}"
