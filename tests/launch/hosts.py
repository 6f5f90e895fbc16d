"""Two hosts on one machine: namespaces of Linux with names, addresses and a cable of their own.

``with two_hosts() as (a, b)``: each host has its own network (one interface, ``eth0``), host name,
process numbers and mounts; files are shared, as over a network file system. ``a.start(command)``
runs there what a user would type there. All of a host dies with the process that holds it, and
that one ends when this process does, however it ends: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TextIO

import psutil
from commands import LIMIT, REPOSITORY, Outcome, kill_tree

INTERFACE = "eth0"
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.73.0.1", "10.73.0.2")
# What two_hosts raises where the kernel, or a container, does not let it do something.
_REFUSALS = (OSError, ValueError, AssertionError, subprocess.SubprocessError, psutil.Error)
_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}

# The first process of a host. It waits for the end of its standard input.
_HOLDER = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
ip link set lo up
echo ready
exec cat
"""


@dataclass
class Host:
    """One of two hosts.

    Attributes:
        name: its host name, which both hosts resolve.
        address: of its interface ``eth0``.
        pid: of the process that holds it, as this machine numbers processes.
        started: what :meth:`start` started here.
    """

    name: str
    address: str
    pid: int
    started: list[Started] = field(default_factory=list)

    def command(self, *argv: object) -> list[str]:
        """A command line that runs another one on this host, in the checkout's folder."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid"]
        return [*enter, "env", f"--chdir={REPOSITORY}", *(str(part) for part in argv)]

    def start(self, *argv: object, **variables: object) -> Started:
        """Run a command here, beside this process.

        Args:
            argv: a program and its arguments.
            variables: of the environment, beside those of this process and GLOO_SOCKET_IFNAME,
                without which gloo would listen on 127.0.0.1; None takes one away.
        """
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
        env |= {name: str(value) for name, value in variables.items() if value is not None}
        for name in [name for name, value in variables.items() if value is None]:
            env.pop(name, None)
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            self.command(*argv),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(Started(self, process, output))
        return self.started[-1]

    def run(self, *argv: object) -> str:
        """What a short command prints here; it must succeed."""
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{argv} on {self.name}: {done.stderr}"
        return done.stdout

    def cut_link(self) -> None:
        """Pull the cable: nothing arrives any more, nobody is told."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def mend_link(self) -> None:
        """Plug the cable in again."""
        self.run("ip", "link", "set", INTERFACE, "up")

    def crash(self) -> None:
        """Kill everything here at once, and the network with it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        for started in self.started:
            started.process.wait(60)


@dataclass
class Started:
    """A command under way on a host."""

    host: Host
    process: subprocess.Popen[bytes]
    _output: TextIO

    def output(self) -> str:
        """What it has written so far, to stdout and stderr."""
        file = self._output.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def wait(self, limit: float = LIMIT) -> Outcome:
        """Its end. Raises TimeoutError, with what it wrote, after so many seconds."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"on {self.host.name} after {limit} s:\n{self.output()}") from None
        return Outcome(status, self.output())

    def wait_for(self, text: str, limit: float = LIMIT) -> str:
        """Return when its output holds a text; raises when it ends, or time is up, before."""
        deadline = time.monotonic() + limit
        while text not in (output := self.output()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                if text in (output := self.output()):
                    break
                raise AssertionError(f"{self.host.name} never said {text!r}:\n{output}")
            time.sleep(0.05)
        return output


def wait_all(started: Sequence[Started], limit: float = LIMIT) -> list[Outcome]:
    """The ends of several commands, which may depend on each other."""
    deadline = time.monotonic() + limit
    return [each.wait(max(deadline - time.monotonic(), 0.1)) for each in started]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a cable; see the top of this file for what they share."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        table = Path(folder) / "hosts"
        pairs = list(zip(ADDRESSES, NAMES, strict=True))
        lines = [("127.0.0.1", "localhost"), *pairs]
        table.write_text("".join(f"{address} {name}\n" for address, name in lines))
        a, b = (stack.enter_context(_host(name, address, table)) for address, name in pairs)
        ends = (INTERFACE, "netns", str(a.pid)), ("name", INTERFACE, "netns", str(b.pid))
        cable = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
        subprocess.run(cable, check=True, capture_output=True)
        for host in (a, b):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.mend_link()
        yield a, b


@contextlib.contextmanager
def _host(name: str, address: str, table: Path) -> Iterator[Host]:
    spaces = ["--net", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    holder = subprocess.Popen(
        ["unshare", *spaces, "sh", "-c", _HOLDER, "sh", name, str(table)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    host = None
    try:
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            raise OSError(holder.stderr.read().decode().strip())
        (first,) = psutil.Process(holder.pid).children()
        host = Host(name, address, first.pid)
        yield host
    finally:
        for started in host.started if host else ():
            kill_tree(started.process.pid)
            started.process.wait(60)
        kill_tree(holder.pid)
        holder.communicate()


@cache
def why_not() -> str | None:
    """Why this machine cannot make two hosts; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts on one machine need Linux and root"
    missing = sorted({package for name, package in _PROGRAMS.items() if not shutil.which(name)})
    if missing:
        return f"two hosts on one machine need {', '.join(missing)}: apt-get install them"
    try:
        with two_hosts() as (a, b):
            a.run("true"), b.run("true")
    except _REFUSALS as error:
        return f"namespaces are not allowed here: {getattr(error, 'stderr', None) or error}"
    return None
