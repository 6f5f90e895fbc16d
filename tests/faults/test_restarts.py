"""What a launcher makes of a run that a rank or a host is lost from: it goes on, or ends."""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import BIN, LIMIT, REPOSITORY, TINY, forked, free_port, kill_tree, rank_process
from hosts import Host, Started
from test_resume import assert_same_run

from moco_scale.utils.errors import LOST_PEER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SAVING = ("--checkpoint-freq", 1, "--keep-checkpoints", 1)
LONG = ("--epochs", 4)  # 16 steps: not done before the signal comes, however busy the machine is
# More than a healthy rank is kept from a busy machine's cores.
PATIENCE = ("--hang-timeout", 15)


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_restarts_and_the_run_ends_as_if_nothing_had_happened(
    tiny_shards: Path, tmp_path: Path, harm: signal.Signals
) -> None:
    data = ("--data-dir", tiny_shards)
    flags = (*TINY, *LONG, *SAVING, *data)
    status, output = forked(*flags, "--output-dir", tmp_path / "whole", ranks=2)
    assert status == 0, output
    argv = (
        *(BIN / "torchrun", "--nproc-per-node", 2, "--max-restarts", 1),
        *("--master-addr", "127.0.0.1", "--master-port", free_port(), "train.py"),
        *(*flags, "--output-dir", tmp_path / "out", *PATIENCE),
    )
    launcher = subprocess.Popen(
        [str(part) for part in argv],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        said, victim = "", None
        for line in launcher.stdout:
            said += line
            if "step 1/16" in line:
                victim = rank_process(launcher.pid, 1)
            elif "step 5/16" in line and "resumed from" not in said:
                assert victim is not None, said
                victim.send_signal(harm)
        assert launcher.wait(LIMIT) == 0, said
    finally:
        kill_tree(launcher.pid)
        launcher.communicate()
    assert "resumed from" in said, said
    host = os.uname().nodename
    missing = rf"train\.py: rank 0 on {host} stops.*rank 1 on {host} was last seen at"
    assert re.search(missing, said), said
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def torchrun(hosts: Sequence[Host], data: Path, out: Path) -> list[Started]:
    return [
        host.start(
            *(BIN / "torchrun", "--nnodes", 2, "--nproc-per-node", 2, "--rdzv-backend", "c10d"),
            *("--rdzv-id", "moco", "--rdzv-endpoint", f"{hosts[0].name}:29400", "train.py"),
            *(*TINY, "--epochs", 100, *PATIENCE),
            *("--data-dir", data, "--output-dir", out),
        )
        for host in hosts
    ]


def reasons(output: str) -> dict[int, str]:
    """Why each rank stopped, as it said."""
    # Not at the beginning of a line: torch's warnings may be there, written piece by piece.
    found = re.findall(r"train\.py: rank (\d) on host-[ab] stops(.*)", output)
    return {int(rank): text for rank, text in found}


def test_a_cut_link(hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path) -> None:
    """Each side names the other: it cannot know more."""
    started = torchrun(hosts, tiny_shards, tmp_path)
    started[0].wait_for("step 3/")
    hosts[1].cut_link()
    first = started[0].wait()
    assert first.status != 0
    said = reasons(first.output)
    assert set(said) == {0, 1}, first.output
    for text in said.values():
        assert re.search(r"ranks 2-3 on host-b were last seen at", text), text
        assert re.search(r"in phase .* of step \d+", text), text
    # torchrun itself waits there for its store on the other host.
    for rank in (2, 3):
        output = started[1].wait_for(f"train.py: rank {rank} on host-b stops")
    said = reasons(output)
    assert set(said) == {2, 3}, output
    for text in said.values():
        assert "rank 0 on host-a" in text, text
        assert re.search(r"cut off\) in phase .* of step \d+", text), text
    assert f"exitcode  : {LOST_PEER}" in first.output, first.output


def test_a_killed_host(hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path) -> None:
    started = torchrun(hosts, tiny_shards, tmp_path)
    started[0].wait_for("step 3/")
    # Not Host.crash: it takes the cable away, and with it the other host's own address.
    kill_tree(started[1].process.pid)
    status, output = started[0].wait()
    assert status != 0
    said = reasons(output)
    assert set(said) == {0, 1}, output
    for text in said.values():
        assert "ranks 2-3 on host-b were last seen at" in text, text


def test_a_frozen_rank_of_another_host(
    hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path
) -> None:
    started = torchrun(hosts, tiny_shards, tmp_path)
    started[0].wait_for("step 3/")
    rank_process(started[1].process.pid, 3).send_signal(signal.SIGSTOP)
    first, second = (each.wait() for each in started)
    assert first.status != 0 and second.status != 0
    said = reasons(first.output + second.output)
    assert set(said) == {0, 1, 2}, first.output + second.output
    for text in said.values():
        assert "rank 3 on host-b was last seen at" in text, text
