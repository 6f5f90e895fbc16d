"""Noticing that a run stands still, saying who and where, and ending it.

Each rank has two threads beside its training loop. One gives signs of life to the key-value store
where the processes met, over plain TCP and not over the path of the collectives, and reads rank
0's. The other looks at how long its own rank has stood where it stands; all ranks wait for each
other in every step, so that where one is stuck all soon stand still, rank 0 too. Then rank 0 alone
reads everybody's beats and posts what it finds for all; where it is silent itself, the first rank
of every host does. The threads need no answer from the training loop, a GPU or the store to end a
run.
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
from moco_scale.observe.heartbeats import Beat, Heard, place, silent, standing, waited_for
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
from moco_scale.utils.log import say
from moco_scale.utils.own_folders import remove_passing
from moco_scale.utils.parents import children
from moco_scale.utils.text import printable_lines

_RANKS_PER_SECOND = 400  # beats that rank 0's store gets, at most, where ranks are many
_BEATS = 20  # in a time-out, at least
_ROUNDS = 3  # of reading everybody's beats before anybody is said to be missing
_LAST_SECONDS = 10.0  # for each thing that is done before the end
_LONGEST_TEXT = 10_000
_LISTED = 6
_STATES = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits for a disk"}
_VERDICT, _SEEN, _ALARM = "verdict", "seen", "alarm"


class Watch:
    """Watches a run on this rank for as long as the ``with`` block lasts.

    A process on its own has nobody to talk to, and no store; it is ended all the same when it does
    not get on, and says what state the processes that read for it are in.

    When no rank gets on for `timeout` seconds, or one that is gone is not noticed otherwise, every
    rank that can still do so prints which rank is missing and where, writes stacks of its threads
    and torch's flight recorder below `folder`, and ends with :data:`LOST_PEER`. An error of the
    network that ends the block is raised as :class:`PeerLost`, with the same explanation.

    Beats go out every second, or twenty times in `timeout` where that is more often; with more than
    400 ranks as many seconds apart as there are 400s (2,048: 5 s), whatever `timeout` is: three
    small requests of each rank, 1,200 a second for the store. Rank 0 alone adds to that one
    request for all beats, while everything stands still.

    Args:
        phases: where this rank stands.
        timeout: seconds, at least those of twenty beats; 0 watches nothing.
        folder: for what is written down.
        program: its name, for the messages.
    """

    def __init__(self, phases: Phases, timeout: float, folder: Path, program: str) -> None:
        self._phases, self._folder, self._program = phases, folder, program
        self._rank, self._world = collectives.rank(), collectives.world_size()
        self._first_of_host = collectives.local_rank() == 0
        self._host = socket.gethostname()
        self._interval = max(min(timeout / _BEATS, 1.0), self._world / _RANKS_PER_SECOND)
        # With fewer beats in it, healthy ranks would seem to be silent.
        self._timeout = max(timeout, _BEATS * self._interval) if timeout else 0.0
        self._closed, self._wake = threading.Event(), threading.Event()
        self._last_word = threading.Lock()  # one thread alone ends the run
        self._still = self._grace = 0.0
        self._last, self._looked = phases.now, time.monotonic()
        self._count = 0
        self._heard: dict[int, Heard] = {}
        self._read_all = False
        self._full_rounds = 0  # in which everybody's beats were read, since that was begun
        self._slowest = 0.0  # seconds of the longest round: the store's, and so everybody's, pace
        self._alarmed = -math.inf  # when another rank said that the network had failed
        self._alarm = False  # this one has to say so
        self._answered = time.monotonic()
        self._broken = ""
        self._posting: Verdict | None = None
        self._verdict: Verdict | None = None
        self._junk = False
        self._seen_by = 0

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
                # The launcher asks all to end when one has; there is still to be said which.
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
        """What the store says of the end of the run; None for what no rank has written."""
        try:
            return parse_verdict(content)
        except DocumentError as error:
            self._say_junk(error)
            return None

    def _say_junk(self, error: DocumentError) -> None:
        if not self._junk:
            self._junk = True
            say(
                f"{self._program}: {self._me()} passes over {error}: somebody else writes to the "
                "store, whose port nobody outside the job should reach (docs/security.md)"
            )

    def _beat(self) -> None:
        self._count += 1
        step, entry, phase, _ = self._phases.now
        device = None
        if self._still > self._timeout / 4 and self._phases.device is not None:
            reached = self._phases.device.where()
            device = reached[:3] if reached else None
        beat = Beat(
            rank=self._rank,
            host=self._host,
            count=self._count,
            clock=time.strftime("%H:%M:%S"),
            step=step,
            entry=entry,
            phase=phase,
            still=self._still,
            patient=not self._phases.steady,
            device=device,
        )
        self._store.set(_key(self._rank), beat.encode())

    def _listen(self, ranks: range) -> None:
        known = [_key(rank) for rank in ranks if rank in self._heard]
        others = [_key(rank) for rank in ranks if rank not in self._heard]
        # To get a key that is not there would wait for it.
        if others and not self._store.check(others):
            others = [key for key in others if self._store.check([key])]
        heard, now = dict(self._heard), time.monotonic()
        keys = known + others
        for key, text in zip(keys, self._store.multi_get(keys), strict=True):
            try:
                beat = Beat.decode(text)
                if _key(beat.rank) != key:
                    raise DocumentError(f"a sign of life of rank {beat.rank} in the place {key}")
            except DocumentError as error:
                self._say_junk(error)
                continue
            before = self._heard.get(beat.rank)
            same = before is not None and before.beat.count == beat.count
            heard[beat.rank] = Heard(beat, before.changed if before and same else now)
        self._heard = heard

    # The thread that decides: it never waits for the store.

    def _judge(self) -> None:
        while not self._closed.wait(self._interval) and not self._last_word.locked():
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        # A process that was itself stopped for a while has watched nothing in that time.
        passed, self._looked = min(now - self._looked, 3 * self._interval), now
        self._still = self._still + passed if self._phases.now is self._last else 0.0
        self._last = self._phases.now
        self._read_all = self._world > 1 and self._reads(now)
        text = None
        if self._verdict is not None:
            self._grace += passed
            # Who hears of an error of another's mostly meets its end by itself in a moment.
            if not self._verdict.ended or self._grace > 3 * self._interval + 2:
                text = self._verdict.text
        elif self._world == 1:
            text = self._stuck_alone()
        elif self._still > 0.9 * self._timeout:
            text = self._finding(now)
        elif now - self._alarmed < self._search:
            # A rank has met an error of the network that this one may never meet.
            text = self._store_lost(now) or self._gone(now, self._alarmed)
        if text is not None:
            self._end(text)

    @property
    def _patience(self) -> float:
        return collectives.patience(self._timeout)

    @property
    def _search(self) -> float:
        """Seconds to find a rank that is gone, once the network says that one is."""
        return 8 * self._interval + 4 * self._slowest + 5

    def _reads(self, now: float) -> bool:
        """Whether everybody's beats are to be read, and by this rank."""
        if self._still <= self._timeout / 2:
            return now - self._alarmed < self._search
        # Whoever should have read and spoken by then has not.
        if self._rank == 0 or self._still > self._patience + self._timeout:
            return True
        return self._first_of_host and self._rank_0_missing(now, 0.15 * self._timeout) is not None

    def _silent(self, now: float, after: float, world: int) -> str | None:
        """Which of the first ranks do not beat, though the store is quick enough to hear them."""
        heard = {rank: heard for rank, heard in self._heard.items() if rank < world}
        return silent(heard, world, now, max(after, 4 * self._slowest))

    def _rank_0_missing(self, now: float, after: float) -> str | None:
        return self._silent(now, after, 1)

    def _gone(self, now: float, begun: float) -> str | None:
        """Who does not beat any more, since the network has said that some rank does not."""
        if now - begun < 3 * self._interval + 1 or self._full_rounds < _ROUNDS:
            return None
        return self._silent(now, 2.5 * self._interval + 0.5, self._world)

    def _finding(self, now: float) -> str | None:
        """What is wrong, once this rank has stood still for long; None: it may still go on."""
        lost = self._store_lost(now)
        if lost is not None:
            return lost
        after = 0.3 * self._timeout
        if not self._read_all:  # rank 0 will say it, or one that reads in its place
            late = self._still > 0.9 * self._timeout + 3 * self._interval + 4 * self._slowest
            return self._rank_0_missing(now, after) if late else None
        if self._full_rounds < _ROUNDS:
            return None
        missing = self._silent(now, after, self._world)
        if missing is not None:
            return missing
        behind, waiting = waited_for(heard.beat for heard in self._heard.values())
        if any(beat.patient and beat.still < self._patience for beat in behind):
            return None
        return standing(behind, waiting)

    def _stuck_alone(self) -> str | None:
        """What is wrong with a process on its own; None: it may still go on."""
        limit = self._timeout if self._phases.steady else self._patience
        return f"it does not get on{_of_children()}" if self._still > limit else None

    def _store_lost(self, now: float) -> str | None:
        late = now - self._answered > max(0.3 * self._timeout, 3 * self._interval)
        if not self._broken and not late:
            return None
        if self._rank == 0:
            return (
                f"the network of {self._host} itself is gone: not even this rank reaches its store"
            )
        how = f" ({self._broken})" if self._broken else ""
        text = f"rank 0 is not heard of{how}: frozen, dead or cut off"
        if 0 in self._heard:
            beat = self._heard[0].beat
            text = (
                f"{beat.name}, by way of whose host ranks hear of each other, has not answered "
                f"since {beat.clock}{how}: frozen, dead or cut off; last was in {beat.place}"
            )
        return text

    def _who_left(self, error: RuntimeError) -> str:
        """Which rank is gone, when the network says that some is."""
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
            if now - begun > 1.0:  # rank 0 may have gone because of another, and have said so
                found = self._store_lost(now) or (self._read_all and self._gone(now, begun))
                if found:
                    return found
        if self._verdict is not None:
            return self._verdict.text
        return rank_0 or f"another process ended, or the network failed ({first_line(error)})"

    # The end.

    def _post(self, text: str, ended: bool = False) -> None:
        """Let the others know, as far as they can be reached."""
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
            f"{self._program}: {self._me()} stops, having stood in {self._place()} for "
            f"{self._still:.0f} s (--hang-timeout {self._timeout:g}): {text}"
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
    """Do what the terminal or a file system may hang in; not for long."""
    doing = threading.Thread(target=work, args=(line,), daemon=True)
    doing.start()
    doing.join(_LAST_SECONDS)


def _write_at_once(line: str) -> None:
    """Not through Python's buffers: the training loop may hold their lock."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), line.encode())


def _of_children() -> str:
    """Which of this process's own are stopped, or wait for a disk."""
    parts = [
        f"process {number}, which it has started, {_STATES[state]}"
        for number, state in children("TtD")[:_LISTED]
    ]
    return "".join(f"; {part}" for part in parts)


def _is_mine(error: BaseException) -> bool:
    """Whether an error is this rank's own: others raise no such error at the same time."""
    agreed = isinstance(error, UserError) and not isinstance(error, RankError)
    known = agreed or isinstance(error, StoppedEarly | PeerLost)
    return isinstance(error, Exception) and not known


def _key(rank: int) -> str:
    return f"beat/{rank}"
