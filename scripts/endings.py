"""End tiny runs in every way of docs/endings.md, and print what each took and left behind.

    python scripts/endings.py [--launchers python torchrun deepspeed] [--rows NAME ...]

Each row is one run that harm comes to once it has made some steps. Status 1 where an ending is not
what the table promises.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = ("python", "torchrun", "deepspeed")
FREQ = 5
"""Steps between checkpoints: what may be lost at most where nothing can be saved any more."""
HANG = 8
LIMIT = 240.0
MARK = "MOCO_SCALE_ENDING"
TINY = (
    *("--dataset", "images", "--model", "resnet18", "--image-size", "16", "--nce-k", "32"),
    *("--batch-size", "8", "--bn-group-size", "4", "--epochs", "10000", "--print-freq", "1"),
    *("--num-workers", "1", "--knn-freq", "0", "--device", "cpu", "--save-freq", "0"),
    *("--checkpoint-freq", str(FREQ), "--keep-checkpoints", "2", "--hang-timeout", str(HANG)),
)


NOWHERE = {
    **{"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"},
    "MASTER_PORT": "29511",
}
Statuses = dict[str, int]


class Run:
    """One run under way, and whom of it harm can come to."""

    def __init__(self, launcher: str, row: Row, data: Path, folder: Path) -> None:
        self.launcher, self.row, self.out = launcher, row, folder / "out"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.name = folder.name
        environment = os.environ | {
            **{MARK: self.name, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)},
            **{k: v.format(tmp=self.temporary) for k, v in row.environment.items()},
        }
        Path(environment["TMPDIR"]).mkdir(parents=True, exist_ok=True)
        flags = [*TINY, "--data-dir", str(data), "--output-dir", str(self.out), *row.flags]
        self.shm = set(os.listdir("/dev/shm"))
        self.output = folder / "output"
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                row.around([*command(launcher), "train.py", *flags]),
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=row.prepare,
            )

    def processes(self) -> list[psutil.Process]:
        """All that belong to it, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.name:
                    found.append(process)
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found: dict[int, psutil.Process] = {}
        everybody = self.processes()
        for process in everybody:
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "train.py" in line and "python" in line[0] and "launch" not in " ".join(line):
                    parent = process.parent()
                    if not (parent and parent.cmdline() == line):  # a reader is its fork
                        found[int(process.environ().get("RANK", 0))] = process
        return [found[rank] for rank in sorted(found)]

    def readers(self, rank: int = 0) -> list[psutil.Process]:
        """The processes that read for a rank."""
        main = self.ranks()[rank]
        return [child for child in main.children() if child.cmdline() == main.cmdline()]

    def wait_for_step(self, step: int = 2 * FREQ + 2) -> None:
        deadline = time.monotonic() + LIMIT
        while self.step() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no step {step}:\n{self.said()}")
            time.sleep(0.05)

    def step(self) -> int:
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"])
        return 0

    def saved(self) -> int:
        done = self.out.glob("checkpoints/step-*/meta.json")
        return max((int(path.parent.name[5:]) for path in done), default=0)

    def said(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]

    def signal(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)


def command(launcher: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "python": [sys.executable],
        "torchrun": [
            *(str(BIN / "torchrun"), "--nproc-per-node=2", "--master-addr=127.0.0.1"),
            f"--master-port={port}",
        ],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port],
    }[launcher]


@dataclass(frozen=True)
class Row:
    """A way to end.

    Attributes:
        name: as docs/endings.md has it.
        harm: done to the run once it has made some steps; None: nothing is waited for.
        status: by launcher; ANY is the launcher's own affair.
        lost: steps that may be lost: 0 where it saves.
        flags: further ones of train.py.
        environment: of the run; ``{tmp}`` is its folder for temporary files.
        prepare: called in the process before it is started.
        around: makes the command line of a longer one.
        limited: seconds that it may take.
    """

    name: str
    harm: Callable[[Run], None] | None
    status: Statuses
    lost: int = 0
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    around: Callable[[list[str]], list[str]] = list
    limited: float = 60.0


def to_launcher(number: int, times: int = 1) -> Callable[[Run], None]:
    """deepspeed's passes nothing on: its whole group is meant, as a terminal does it."""

    def harm(run: Run) -> None:
        for again in range(times):
            with contextlib.suppress(ProcessLookupError):
                time.sleep(2.5 if again else 0)
                run.signal(number, group=run.launcher == "deepspeed")

    return harm


def to_ranks(number: int) -> Callable[[Run], None]:
    def harm(run: Run) -> None:
        for process in run.ranks():
            process.send_signal(number)

    return harm


def to_last_rank(number: int) -> Callable[[Run], None]:
    return lambda run: run.ranks()[-1].send_signal(number)


def to_reader(number: int) -> Callable[[Run], None]:
    return lambda run: run.readers(-1)[0].send_signal(number)


def twice_in_a_step(run: Run) -> None:
    """Ctrl-C and again, in a step that does not end: it waits for readers that are stopped."""
    for rank in range(len(run.ranks())):
        for reader in run.readers(rank):
            reader.send_signal(signal.SIGSTOP)
    step = -1
    while step != run.step():  # batches that were read before
        step = run.step()
        time.sleep(1.0)
    to_launcher(signal.SIGINT, times=2)(run)


def to_launcher_alone(run: Run) -> None:
    run.process.kill()


def goes_on(run: Run) -> None:
    run.signal(signal.SIGHUP, group=True)
    run.wait_for_step(run.step() + 10)
    to_ranks(signal.SIGTERM)(run)


def limit(what: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def shell(text: str) -> Callable[[list[str]], list[str]]:
    return lambda words: ["bash", "-c", text, "bash", *words]


SHORT = ("--max-steps", "12")
ANY = -1000


def statuses(
    python: int | None, torchrun: int | None = ANY, deepspeed: int | None = ANY
) -> Statuses:
    """By launcher, of which None has no such row."""
    found = {"python": python, "torchrun": torchrun, "deepspeed": deepspeed}
    return {launcher: status for launcher, status in found.items() if status is not None}


ROWS = (
    Row("normal end", None, statuses(0, 0, 0), flags=SHORT),
    Row("--max-time", None, statuses(75, 1), flags=("--max-time", "0.006")),
    Row("SIGTERM", to_launcher(signal.SIGTERM), statuses(75)),
    Row("SIGUSR1 to the processes", to_ranks(signal.SIGUSR1), statuses(75, 1)),
    Row("SIGHUP", to_launcher(signal.SIGHUP), statuses(75)),
    Row("SIGHUP under nohup", goes_on, statuses(75, None), around=lambda words: ["nohup", *words]),
    Row("Ctrl-C", to_launcher(signal.SIGINT), statuses(130)),
    Row("Ctrl-C twice", twice_in_a_step, statuses(-2), lost=FREQ),
    Row(
        "output closed",
        None,
        statuses(0, 0, 0),
        flags=SHORT,
        around=shell('"$@" 2>&1 | head -4; exit $PIPESTATUS'),
    ),
    Row("output full", None, statuses(0, 0), flags=SHORT, around=shell('"$@" >/dev/full 2>&1')),
    Row("a reader killed", to_reader(signal.SIGKILL), statuses(69, 1)),
    Row("a reader stopped", to_reader(signal.SIGSTOP), statuses(69, 1), lost=FREQ),
    Row("a process killed", to_last_rank(signal.SIGKILL), statuses(-9, 1), lost=FREQ),
    Row("a process stopped", to_last_rank(signal.SIGSTOP), statuses(None, 1), lost=FREQ),
    Row("the launcher killed", to_launcher_alone, statuses(None, -9, -9)),
    Row(
        "a file too large in a save",
        None,
        statuses(2, 1),
        lost=FREQ,
        prepare=limit(resource.RLIMIT_FSIZE, 50 << 20),
    ),
    Row(
        "loss not finite",
        None,
        statuses(2, 1),
        lost=ANY,
        flags=("--base-lr", "1e30", "--max-nonfinite", "2", "--warmup-epoch", "0"),
    ),
    Row("a mistake of the user's", None, statuses(2, 1, 2), flags=("--nce-k", "0")),
    Row("30 open files", None, statuses(2, None, None), prepare=limit(resource.RLIMIT_NOFILE, 30)),
    Row("a long TMPDIR", None, statuses(2, 1), environment={"TMPDIR": "{tmp}/" + "x" * 150}),
    Row("MASTER_ADDR unknown", None, statuses(2, None, None), environment=NOWHERE),
)


def measured(launcher: str, row: Row, data: Path, folder: Path) -> tuple[dict[str, object], str]:
    """Measure an ending; return its figures and its problems."""
    begun = time.monotonic()
    run = Run(launcher, row, data, folder)
    try:
        if row.harm is not None:
            run.wait_for_step()
            begun = time.monotonic()
            row.harm(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(LIMIT)
        status = run.process.returncode
        while (left := run.processes()) and time.monotonic() - begun < LIMIT:
            if status == 0:  # a launcher that has ended well has nobody left
                break
            time.sleep(0.1)
        seconds = time.monotonic() - begun
        found: dict[str, object] = {
            "status": status,
            "seconds": round(seconds, 1),
            "lost": run.step() - run.saved(),
            "processes": len(left),
            "shm": len(set(os.listdir("/dev/shm")) - run.shm),
            "locked": is_locked(run.out / ".lock"),
            "tmp": " ".join(p.name for p in run.temporary.iterdir() if p.name[0] != "x") or 0,
        }
    finally:
        for process in run.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        run.process.wait()
    wanted = row.status[launcher]
    wrong = [
        name
        for name, bad in (
            ("status", wanted not in (ANY, status)),
            ("lost", row.lost != ANY and int(str(found["lost"])) > row.lost),
            ("left", bool(found["processes"] or found["locked"])),
            ("late", seconds > row.limited + (row.harm is None) * 60),
            ("traceback", "Traceback" in run.said() and launcher == "python"),
            ("aborted", "terminate called" in run.said()),
        )
        if bad
    ]
    return found, ", ".join(wrong) + ("\n" + run.said() if wrong else "")


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def make_data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("ash", "birch"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
                image.save(folder / "images" / split / name / f"{i}.jpg")
    words = ("shard", "--source", folder / "images", "--out", folder / "shards", "--workers", "1")
    subprocess.run(
        [sys.executable, "-m", "moco_scale", *map(str, words)], cwd=REPOSITORY, check=True
    )
    return folder / "shards"


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS[:2])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    args = parser.parse_args(None if argv is None else list(argv))
    problems = []
    with tempfile.TemporaryDirectory(prefix="endings-", dir="/tmp") as temporary:
        folder = Path(temporary)
        data = make_data(folder)
        columns = ("status", "seconds", "lost", "processes", "shm", "locked", "tmp")
        print("ending | launcher | " + " | ".join(columns), flush=True)
        for number, row in enumerate(ROWS):
            for launcher in args.launchers:
                if launcher not in row.status or row.name not in (args.rows or [row.name]):
                    continue
                own = folder / f"{number}-{launcher}"
                own.mkdir()
                found, wrong = measured(launcher, row, data, own)
                cells = " | ".join(str(found[column]) for column in columns)
                print(f"{row.name} | {launcher} | {cells}", flush=True)
                if wrong:
                    problems.append(f"{row.name}, {launcher}: {wrong}")
                shutil.rmtree(own)
    for problem in problems:
        print(problem)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
