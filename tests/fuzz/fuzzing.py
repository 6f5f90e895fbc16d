"""Feeds a parser mutated inputs and looks for tracebacks, hangs and memory.

``python tests/fuzz/fuzzing.py tar --seconds 3600`` fuzzes one parser and leaves what failed in a
folder. A target is a module ``NAME_target`` beside this file with

- ``SEEDS() -> list[bytes]``: small valid inputs;
- ``run(data: bytes, folder: Path) -> None``: one input through the parser, which may raise nothing:
  the errors that users are meant to see are caught inside. ``folder`` is empty at first and the
  target's own.

Inputs that reach new lines of the package are kept and mutated further.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = str(Path(__file__).resolve().parents[2] / "moco_scale")
TARGETS = sorted(
    path.stem.removesuffix("_target") for path in Path(__file__).parent.glob("*_target.py")
)

SECONDS_AN_INPUT = 10.0
"""Of processor time; a busy machine is no hang."""
WAITING_SECONDS = 300.0
"""Of the clock: an input that waits so long ends the fuzzer, with a traceback."""
MEMORY = 1 << 30
"""Bytes by which the largest resident size may grow."""
LARGEST = 1 << 20
"""Bytes of a mutated input at most."""

_NUMBERS = [
    -1,
    0,
    1,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
_TOKENS = [
    *(str(number).encode() for number in _NUMBERS),
    *(b"NaN", b"Infinity", b"null", b"true", b"-0.0", b"1e999", b'""', b"[]", b"{}", b"[" * 300),
    *(
        b"../",
        b"/etc/x",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\x1b[2J",
        b"\r\n",
    ),
    *(b"\xed\xa0\x80", b"\xb2", b"%s%n", b"A" * 300, b"9" * 5000),
]


class HangError(Exception):
    """An input takes longer than it may."""


@dataclass
class Result:
    """What a session of fuzzing saw.

    Attributes:
        inputs: how many were tried.
        kept: how many reached lines that none before had.
        seconds: of processor time.
        failures: (what happened, input), each place once.
    """

    inputs: int = 0
    kept: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, bytes]] = field(default_factory=list)


def fuzz(
    seeds: list[bytes],
    run: Callable[[bytes, Path], None],
    seconds: float,
    seed: int = 0,
    before: Callable[[bytes], None] = lambda data: None,
) -> Result:
    """Try seeds, then mutations of them, for some seconds.

    Args:
        seeds: valid inputs.
        run: of a target.
        seconds: of the clock.
        seed: of the mutations.
        before: called with each input before it is tried.
    """
    draw, corpus, seen, places = random.Random(seed), list(seeds), set[Any](), set[str]()
    result, start = Result(), time.process_time()
    pending = list(seeds)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        while time.monotonic() < end or pending:
            data = pending.pop() if pending else mutated(draw.choice(corpus), corpus, draw)
            before(data)
            lines, failure = _try(run, data, Path(name))
            result.inputs += 1
            if failure and failure not in places:
                places.add(failure)
                result.failures.append((failure, data))
            if not lines <= seen:
                seen |= lines
                corpus.append(data)
                result.kept += 1
    result.seconds = time.process_time() - start
    return result


def _try(run: Callable[[bytes, Path], None], data: bytes, folder: Path) -> tuple[set[Any], str]:
    """Run one input; return the lines of the package it reached, and what went wrong or ""."""
    lines: set[Any] = set()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failure = ""
    try:
        with _time_limit(), _tracing(lines):
            run(data, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        at = next((f for f in reversed(frames) if f.filename.startswith(PACKAGE)), frames[-1])
        failure = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {error}"[:300]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
    if grown > MEMORY:
        failure = failure or f"takes {grown >> 20} MB"
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return lines, failure


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise HangError(f"computes for more than {SECONDS_AN_INPUT:g} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_AN_INPUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _tracing(lines: set[Any]) -> Iterator[None]:
    def inside(frame: FrameType, event: str, _: Any) -> Any:
        lines.add((frame.f_code, frame.f_lineno))
        return inside

    def at_call(frame: FrameType, event: str, _: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)


def mutated(data: bytes, corpus: list[bytes], draw: random.Random) -> bytes:
    """Change an input in one to eight places."""
    value = bytearray(data)
    for _ in range(1 << draw.randrange(4)):
        at = draw.randrange(len(value) + 1)
        length = min(1 << draw.randrange(10), len(value) - at)
        kind = draw.randrange(9)
        if kind == 0 and at < len(value):
            value[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(value):
            value[at] = draw.randrange(256)
        elif kind == 2:
            del value[at : at + length]
        elif kind == 3:
            value[at:at] = value[at : at + length] * draw.choice([1, 1, 2, 50])
        elif kind == 4:
            token = draw.choice(_TOKENS)
            value[at : at + draw.choice([0, len(token), length])] = token
        elif kind == 5:
            size, order = draw.choice([1, 2, 4, 8]), draw.choice(["big", "little"])
            number = draw.choice(_NUMBERS) % (1 << 8 * size)
            value[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
        elif kind == 6:
            other = draw.choice(corpus)
            start = draw.randrange(len(other) + 1)
            value[at : at + length] = other[start : start + 512]
        elif kind == 7:
            del value[at:]
        else:
            value[at : at + length] = draw.randbytes(length)
    return bytes(value[:LARGEST])


def load(name: str) -> Any:
    """Import the module of a target."""
    return importlib.import_module(f"{name}_target")


def main() -> int:
    """Fuzz one parser from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", choices=TARGETS, nargs="?")
    parser.add_argument("--list", action="store_true", help="print the names of the targets")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"))
    args = parser.parse_args()
    if args.list or args.target is None:
        print(*TARGETS, sep="\n")
        return 0
    args.failures.mkdir(parents=True, exist_ok=True)
    current = args.failures / f"{args.target}.current"

    def before(data: bytes) -> None:
        current.write_bytes(data)  # what a hang in a library, or a crash, leaves
        faulthandler.dump_traceback_later(WAITING_SECONDS, exit=True)

    faulthandler.enable()
    target = load(args.target)
    result = fuzz(target.SEEDS(), target.run, args.seconds, args.seed, before)
    faulthandler.cancel_dump_traceback_later()
    current.unlink()
    print(
        f"{args.target}: {result.inputs} inputs, {result.kept} kept, {result.seconds:.0f} s of "
        f"processor time, {len(result.failures)} failures"
    )
    for what, data in result.failures:
        path = args.failures / f"{args.target}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"  {path}: {what}")
    return int(bool(result.failures))


if __name__ == "__main__":
    sys.exit(main())
