"""Start the project's commands as users do, and take them down again; tiny runs to start.

:func:`forked` is the cheap way: it runs a script as ``__main__`` in processes forked off a server
that has imported torch, which saves the seconds that a start otherwise takes. :func:`launched` and
:func:`started` use the real launchers. Whatever is started leads a session of its own, and none of
its processes outlives the call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from harness import CONTEXT, free_port

from moco_scale.commands import shard

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = ("python", "torchrun", "deepspeed")

# Far more than anything here takes: it only bounds the wait for something that hangs.
LIMIT = 600.0

TINY = (
    *("--dataset", "images", "--model", "resnet18", "--image-size", "16", "--nce-k", "32"),
    *("--batch-size", "8", "--bn-group-size", "4", "--epochs", "2", "--print-freq", "1"),
    *("--num-workers", "0", "--knn-freq", "0", "--device", "cpu"),
)
"""Flags of a run whose steps take a moment: 8 of them, two epochs of 4, on 32 images."""

ZERO1 = (
    *("--deepspeed", "ds_configs/zero1.json", "--knn-freq", "1"),
    *("--save-freq", "1", "--checkpoint-freq", "3"),
)
"""Flags of the uninterrupted run of two processes that several tests compare with."""


class Outcome(NamedTuple):
    """How a command ended: its exit status, and what it wrote to stdout and stderr together."""

    status: int
    output: str


def flags_for(data: Path, out: Path) -> tuple[object, ...]:
    """Flags of a tiny run on these shards that is written there."""
    return (*TINY, "--data-dir", data, "--output-dir", out)


def assert_refused(run: Outcome, *words: object) -> None:
    """A user's error: status 2 and one message without a traceback, in which the words are."""
    assert run.status == 2, run.output
    assert "Traceback" not in run.output, run.output
    assert run.output.count("error: ") == 1, run.output
    for word in words:
        assert str(word) in run.output, f"no {str(word)!r} in:\n{run.output}"


def make_shards(source: Path, out: Path, *flags: str) -> Path:
    """Shards of a folder of images, 10 to a shard; returns ``out``."""
    parser = argparse.ArgumentParser()
    shard.add_arguments(parser)
    command = ["--source", source, "--out", out, "--shard-size", 10, "--workers", 1, *flags]
    shard.run(parser.parse_args([str(part) for part in command]))
    return out


def forked(
    *arguments: object,
    ranks: int = 1,
    script: str = "train.py",
    cwd: Path = REPOSITORY,
    prepare: Callable[..., None] | None = None,
    prepare_args: tuple[object, ...] = (),
) -> Outcome:
    """Run a script of the checkout without a launcher.

    Args:
        arguments: of the command line.
        ranks: processes of one job, with the environment that torchrun would give them. When one
            fails, the others get some seconds to end by themselves and are then killed.
        script: a file of the checkout, or a module as ``-m NAME``.
        cwd: where to run it.
        prepare: called in each process before the script; importable by name.
        prepare_args: its arguments.

    Returns:
        The status of the first process that failed, else 0; the output of all ranks.
    """
    statuses: dict[int, int] = {}
    with forked_ranks(
        *arguments, ranks=ranks, script=script, cwd=cwd, prepare=prepare, prepare_args=prepare_args
    ) as job:
        deadline = time.monotonic() + LIMIT
        while len(statuses) < ranks and time.monotonic() < deadline:
            running = {p.sentinel: r for r, p in enumerate(job.processes) if r not in statuses}
            for sentinel in wait(list(running), deadline - time.monotonic()):
                rank = running[sentinel]
                statuses[rank] = job.status(rank)
                if statuses[rank] != 0:
                    deadline = min(deadline, time.monotonic() + 20)
    if not statuses:
        raise TimeoutError(f"still running after {LIMIT:.0f} s: {arguments}\n{job.output()}")
    return Outcome(next((s for s in statuses.values() if s != 0), 0), job.output())


class Ranks:
    """The processes of a job that :func:`forked_ranks` has started, by rank."""

    def __init__(self, processes: list[Any], output: Path) -> None:
        self.processes, self._output = processes, output

    def status(self, rank: int, limit: float = LIMIT) -> int:
        """The exit status of a process, once it has ended; raises when it does not in time."""
        self.processes[rank].join(limit)
        if self.processes[rank].exitcode is None:
            raise TimeoutError(f"rank {rank} still runs after {limit} s\n{self.output()}")
        return int(self.processes[rank].exitcode)

    def output(self) -> str:
        """What all of them have written so far; at the end of the block, all there is."""
        if self._output.exists():
            self._text = self._output.read_text(encoding="utf-8", errors="replace")
        return self._text


@contextlib.contextmanager
def forked_ranks(
    *arguments: object,
    ranks: int,
    script: str = "train.py",
    cwd: Path = REPOSITORY,
    prepare: Callable[..., None] | None = None,
    prepare_args: tuple[object, ...] = (),
) -> Iterator[Ranks]:
    """The processes of :func:`forked`, under way; killed at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        port = free_port()
        argv = [str(argument) for argument in arguments]
        job = Ranks(
            [
                CONTEXT.Process(
                    target=_run_script,
                    args=(script, argv, str(cwd), str(output), rank, ranks, port),
                    kwargs={"prepare": prepare, "prepare_args": prepare_args},
                )
                for rank in range(ranks)
            ],
            output,
        )
        try:
            for process in job.processes:
                process.start()
            yield job
        finally:
            for process in job.processes:
                if process.pid is not None and process.exitcode is None:
                    kill_tree(process.pid)
                process.join()
            job.output()


def _run_script(
    script: str,
    argv: list[str],
    cwd: str,
    output: str,
    rank: int,
    ranks: int,
    port: int,
    *,
    prepare: Callable[..., None] | None,
    prepare_args: tuple[object, ...],
) -> None:
    os.setsid()
    os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(OMP_NUM_THREADS="1")
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    if prepare is not None:
        prepare(*prepare_args)
    sys.path[0] = str(REPOSITORY)
    if script.startswith("-m "):
        sys.argv = [script, *argv]
        runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *argv]
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def before_each_call(module: str, function: str, action: Callable[..., None]) -> None:
    """In this process from now on, call ``action`` with a function's arguments before it.

    For what :func:`forked` calls to `prepare` a process.

    Args:
        module: where the function is looked up.
        function: its name there; of a method ``"Class.method"``.
        action: may raise, or end the process, in the function's place.
    """
    owner: Any = importlib.import_module(module)
    *path, name = function.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def command(launcher: str, *arguments: object, processes: int = 2) -> list[str]:
    """The command line that starts ``train.py`` (of the checkout, which must be the cwd)."""
    argv = [str(argument) for argument in arguments]
    if launcher == "python":
        return [sys.executable, "train.py", *argv]
    if launcher == "torchrun":
        port = f"--master-port={free_port()}"
        count = f"--nproc-per-node={processes}"
        return [str(BIN / "torchrun"), count, "--master-addr=127.0.0.1", port, "train.py", *argv]
    port = str(free_port())
    return [
        *(str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", port),
        *("train.py", *argv),
    ]


@contextlib.contextmanager
def started(
    launcher: str, *arguments: object, processes: int = 2, **keywords: Any
) -> Iterator[subprocess.Popen[str]]:
    """``train.py`` under a launcher, its output to be read from ``stdout``; killed at the end."""
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | keywords
    process = subprocess.Popen(
        command(launcher, *arguments, processes=processes),
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
        **keywords,
    )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.communicate()


def launched(launcher: str, *arguments: object, processes: int = 2) -> Outcome:
    """Run ``train.py`` under a launcher to its end."""
    with started(launcher, *arguments, processes=processes) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired as late:
            raise TimeoutError(f"still running after {LIMIT:.0f} s\n{late.output!r}") from None
    return Outcome(process.returncode, output)


def killed_when(
    launcher: str,
    *arguments: object,
    when: Callable[[str], bool],
    processes: int = 2,
) -> str:
    """Run ``train.py`` until it prints a line that ``when`` likes, then kill -9 all of it.

    Returns:
        What it had printed.
    """
    lines: list[str] = []
    with started(launcher, *arguments, processes=processes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if when(line):
                kill_tree(process.pid)
                return "".join(lines)
    raise AssertionError("it ended before it was killed:\n" + "".join(lines))


def kill_tree(pid: int) -> None:
    """kill -9 a process and all that descend from it; launchers give workers other sessions."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family[1:], timeout=60)


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """The process of ``train.py`` that a launcher has started for a rank."""
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            python = "train.py" in process.cmdline() and process.name().startswith("python")
            if python and process.environ().get("RANK") == str(rank):
                return process
    raise LookupError(f"{launcher} has no process of rank {rank}")


def flags(**values: object) -> Sequence[str]:
    """``flags(nce_t=0.2)`` is ``["--nce-t", "0.2"]``."""
    return [part for k, v in values.items() for part in ("--" + k.replace("_", "-"), str(v))]
