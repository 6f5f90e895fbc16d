"""Runs across two hosts give the curve of the same ranks on one host, whatever launches them."""

import json
import sys
from pathlib import Path

import pytest
from commands import BIN, TINY, forked
from hosts import Host, Started, wait_all

pytestmark = pytest.mark.timeout(1800)

FLAGS = (*TINY, "--max-steps", 5)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def on_one_host(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of four ranks beside each other."""
    out = tmp_path_factory.mktemp("one-host")
    status, output = forked(*FLAGS, "--data-dir", tiny_shards, "--output-dir", out, ranks=4)
    assert status == 0, output
    return losses(out)


def assert_same_curve(started: list[Started], out: Path, wanted: list[float]) -> None:
    for status, output in wait_all(started):
        assert status == 0, output
    assert losses(out) == pytest.approx(wanted, rel=1e-6)


def test_hosts_have_names_addresses_and_a_cable(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    assert [a.run("hostname"), b.run("hostname")] == ["host-a\n", "host-b\n"]
    assert b.address in b.run("ip", "address", "show", "dev", "eth0")
    server = b.start(sys.executable, "-m", "http.server", "8000", "--bind", b.address)
    ask = "import urllib.request as u; print(u.urlopen('http://host-b:8000', timeout=9).status)"
    server.wait_for("Serving HTTP")
    assert a.start(sys.executable, "-c", ask).wait().output == "200\n"
    b.crash()
    assert server.wait().status != 0
    assert a.start(sys.executable, "-c", ask).wait().status != 0


def test_torchrun_with_rendezvous(
    hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path, on_one_host: list[float]
) -> None:
    started = [
        host.start(
            *(BIN / "torchrun", "--nnodes", 2, "--nproc-per-node", 2, "--rdzv-backend", "c10d"),
            *("--rdzv-id", "moco", "--rdzv-endpoint", f"{hosts[0].name}:29400"),
            *("train.py", *FLAGS, "--data-dir", tiny_shards, "--output-dir", tmp_path),
        )
        for host in hosts
    ]
    assert_same_curve(started, tmp_path, on_one_host)
