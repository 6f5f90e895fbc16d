"""Noticing that a run stands still, saying who and where, and ending it.

Each rank has two threads beside its training loop. One gives signs of life to the key-value store
where the processes met, over plain TCP and not over the path of the collectives, and reads what
others gave. The other looks at how long its own rank has stood where it stands; all ranks wait for
each other in every step, so one that is stuck soon stands still itself, and only then everybody's
beats are read. The threads need no answer from the training loop, a GPU or the store to end a run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from moco_scale import distributed
from moco_scale.beats import Beat, Heard, place, silent, standing, waited_for
from moco_scale.errors import (
    LOST_PEER,
    PeerLost,
    RankError,
    StoppedEarly,
    UserError,
    is_peer_gone,
)
from moco_scale.timing import Phases

_RANKS_PER_SECOND = 400  # beats that rank 0's store gets, at most, where ranks are many
_VERDICT, _SEEN = "verdict", "seen"


class Watch:
    """Watches a run on this rank for as long as the ``with`` block lasts.

    When no rank gets on for `timeout` seconds, or one that is gone is not noticed otherwise, every
    rank that can still do so prints which rank is missing and where, writes stacks of its threads
    and torch's flight recorder below `folder`, and ends with :data:`LOST_PEER`. An error of the
    network that ends the block is raised as :class:`PeerLost`, with the same explanation.

    Beats go out twenty times in `timeout`, but not more often than every second, or every 5 s from
    2,048 ranks: three small requests of each rank, 1,200 a second at most for the store.

    Args:
        phases: where this rank stands.
        timeout: seconds; 0 watches nothing, nor does a process on its own.
        folder: for what is written down.
        program: its name, for the messages.
    """

    def __init__(self, phases: Phases, timeout: float, folder: Path, program: str) -> None:
        self._phases, self._timeout, self._folder, self._program = phases, timeout, folder, program
        self._rank, self._world = distributed.rank(), distributed.world_size()
        self._host = socket.gethostname()
        self._interval = min(timeout / 20, max(1.0, self._world / _RANKS_PER_SECOND))
        self._closed, self._wake = threading.Event(), threading.Event()
        self._last_word = threading.Lock()  # one thread alone ends the run
        self._still = 0.0
        self._count = self._rounds = 0
        self._heard: dict[int, Heard] = {}
        self._read_all = False
        self._answered = time.monotonic()
        self._broken = ""
        self._posting: dict[str, Any] | None = None
        self._verdict: dict[str, Any] | None = None
        self._seen_by = 0

    def __enter__(self) -> Watch:
        if self._timeout and self._world > 1:
            self._store = distributed.side_store("watch")
            self._answered = time.monotonic()
            for work in (self._exchange, self._judge):
                threading.Thread(target=work, name=f"watch {work.__name__}", daemon=True).start()
        else:
            self._closed.set()
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
                self._beat()
                if self._posting is not None:
                    text = json.dumps(self._posting)
                    self._verdict = json.loads(self._store.compare_set(_VERDICT, "", text))
                    self._posting = None
                elif self._verdict is None and self._store.check([_VERDICT]):
                    self._verdict = json.loads(self._store.get(_VERDICT))
                    self._store.add(_SEEN, 1)
                if self._verdict is not None:
                    self._seen_by = self._store.add(_SEEN, 0)
                self._listen(range(self._world) if self._read_all else range(1))
                self._answered = time.monotonic()
                self._rounds += 1
                self._wake.wait(self._interval)
                self._wake.clear()
        except Exception as error:  # once broken, a connection of torch's store stays so
            self._broken = _first_line(error)

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
        keys = [_key(rank) for rank in ranks]
        if not self._store.check(keys):  # to get a key that is not there would wait for it
            keys = [key for key in keys if self._store.check([key])]
        now = time.monotonic()
        heard = {} if self._read_all else dict(self._heard)
        for text in self._store.multi_get(keys):
            beat = Beat.decode(text)
            known = self._heard.get(beat.rank)
            new = known is None or known.beat.count != beat.count
            heard[beat.rank] = (
                Heard(beat, now) if new or known is None else Heard(beat, known.changed)
            )
        self._heard = heard

    # The thread that decides: it never waits for the store.

    def _judge(self) -> None:
        last, before = self._phases.now, time.monotonic()
        grace = 0.0
        while not self._closed.wait(self._interval):
            if self._last_word.locked():
                return
            now = time.monotonic()
            # A process that was itself stopped for a while has watched nothing in that time.
            passed, before = min(now - before, 3 * self._interval), now
            self._still = self._still + passed if self._phases.now is last else 0.0
            last = self._phases.now
            self._read_all = self._still > self._timeout / 2
            if self._verdict is not None:
                grace += passed
                # Who hears of an error of another's mostly meets its end by itself in a moment.
                if not self._verdict["ended"] or grace > 3 * self._interval + 2:
                    self._end(self._verdict["text"])
            elif self._still > 0.9 * self._timeout:
                text = self._finding()
                if text is not None:
                    self._end(text)

    def _finding(self) -> str | None:
        """What is wrong, once this rank has stood still for long; None: it may still go on."""
        now, heard = time.monotonic(), self._heard
        lost = self._store_lost(now)
        if lost is not None:
            return lost
        missing = silent(heard, self._world, now, 0.3 * self._timeout)
        if missing is not None:
            return missing
        behind, waiting = waited_for(h.beat for h in heard.values())
        if any(beat.patient for beat in behind) and self._still < distributed.patience(
            self._timeout
        ):
            return None
        return standing(behind, waiting)

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
        first = self._rounds
        begin = time.monotonic()
        limit = 8 * self._interval + 5
        while (passed := time.monotonic() - begin) < limit and self._verdict is None:
            self._read_all = True
            self._wake.set()
            time.sleep(self._interval / 5)
            now = time.monotonic()
            if passed > 1.0:  # rank 0 may have gone because of another, and have said so
                lost = self._store_lost(now)
                if lost is not None:
                    return lost
            if passed > 3 * self._interval + 1 and self._rounds > first + 2:
                missing = silent(self._heard, self._world, now, 2.5 * self._interval + 0.5)
                if missing is not None:
                    return missing
        if self._verdict is not None:
            return str(self._verdict["text"])
        return f"another process ended, or the network failed ({_first_line(error)})"

    # The end.

    def _post(self, text: str, ended: bool = False) -> None:
        """Let the others know, as far as they can be reached."""
        when = time.strftime("%Y%m%d-%H%M%S")
        verdict = {"text": text, "ended": ended, "folder": f"hangs/{when}"}
        if self._verdict is None:
            self._posting = verdict
        self._wait_until(lambda: self._verdict is not None, 2 * self._interval + 1)
        self._verdict = self._verdict or verdict
        if self._rank == 0:  # the store may end with this process: others read first
            everyone = self._world - 1
            self._wait_until(lambda: self._seen_by >= everyone, 3 * self._interval + 1)

    def _wait_until(self, done: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and not self._broken and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(min(self._interval, 0.1))

    def _end(self, text: str) -> NoReturn:
        self._last_word.acquire()
        line = (
            f"{self._program}: {self._me()} stops, having stood in {self._place()} for "
            f"{self._still:.0f} s (--hang-timeout {self._timeout:g}): {text}\n"
        )
        # Not through Python's buffers: the training loop may hold their lock.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), line.encode())
        self._post(text)
        writer = threading.Thread(target=self._write_down, args=(line,), daemon=True)
        writer.start()
        writer.join(10.0)  # the file system may be what hangs
        os._exit(LOST_PEER)

    def _write_down(self, line: str) -> None:
        assert self._verdict is not None
        folder = self._folder / self._verdict["folder"]
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self._rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                faulthandler.dump_traceback(file)
            trace = distributed.flight_record()
            if trace:
                (folder / f"flight_rank_{self._rank}").write_bytes(trace)


def _is_mine(error: BaseException) -> bool:
    """Whether an error is this rank's own: others raise no such error at the same time."""
    agreed = isinstance(error, UserError) and not isinstance(error, RankError)
    known = agreed or isinstance(error, StoppedEarly | PeerLost)
    return isinstance(error, Exception) and not known


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
