"""Runs across two hosts give the curve of the same ranks on one host, whatever launches them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BIN, TINY, forked
from hosts import NAMES, Host, Started, wait_all

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


@pytest.mark.slow
def test_torchrun_with_rendezvous(
    hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path, on_one_host: list[float]
) -> None:
    started = [
        host.start(
            *("scripts/torchrun_elastic.sh", *FLAGS),
            *("--data-dir", tiny_shards, "--output-dir", tmp_path),
            TORCHRUN=BIN / "torchrun",
            RENDEZVOUS=f"{hosts[0].name}:29400",
            NODES=2,
            GPUS=2,
            INTERFACE="eth0",
        )
        for host in hosts
    ]
    assert_same_curve(started, tmp_path, on_one_host)


@pytest.fixture(scope="session")
def zero1_on_one_host(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The same under DeepSpeed's ZeRO-1."""
    out = tmp_path_factory.mktemp("zero1-one-host")
    flags = (*FLAGS, "--deepspeed", "ds_configs/zero1.json", "--data-dir", tiny_shards)
    status, output = forked(*flags, "--output-dir", out, ranks=4)
    assert status == 0, output
    return losses(out)


@pytest.fixture
def deepspeed(tiny_shards: Path, tmp_path: Path) -> tuple[list[object], dict[str, object]]:
    """Its launch file on both hosts, two processes each: a command line and its variables."""
    file = tmp_path / "hostfile"
    file.write_text("".join(f"{name} slots=2\n" for name in NAMES))
    command = ["scripts/deepspeed_hostfile.sh", *FLAGS]
    command += ["--data-dir", tiny_shards, "--output-dir", tmp_path / "out"]
    return command, {"DEEPSPEED": BIN / "deepspeed", "HOSTFILE": file, "INTERFACE": "eth0"}


@pytest.mark.slow
def test_deepspeed_on_each_host_without_ssh(
    hosts: tuple[Host, Host],
    deepspeed: tuple[list[object], dict[str, object]],
    tmp_path: Path,
    zero1_on_one_host: list[float],
) -> None:
    command, variables = deepspeed
    variables["MASTER_ADDR"] = hosts[0].address
    started = [h.start(*command, **variables, NODE_RANK=number) for number, h in enumerate(hosts)]
    assert_same_curve(started, tmp_path / "out", zero1_on_one_host)


@pytest.mark.slow
def test_deepspeed_over_pdsh(
    hosts: tuple[Host, Host],
    deepspeed: tuple[list[object], dict[str, object]],
    tmp_path: Path,
    zero1_on_one_host: list[float],
) -> None:
    missing = [name for name in ("pdsh", "ssh", "sshd", "ssh-keygen") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install pdsh openssh-server")
    offer_ssh(hosts, tmp_path)
    command, variables = deepspeed
    started = hosts[0].start(*command, **variables)
    assert_same_curve([started], tmp_path / "out", zero1_on_one_host)
    assert "host-b" in started.output()


def offer_ssh(hosts: tuple[Host, Host], folder: Path) -> None:
    """Both hosts let root of the other log in with a key made for this."""
    for key in ("login", "host"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
        )
    server = {
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "login.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "none",
    }
    (folder / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in server.items()))
    known = "".join(f"{name} {(folder / 'host.pub').read_text()}" for name in NAMES)
    (folder / "known").write_text(known)
    client = {"IdentityFile": folder / "login", "UserKnownHostsFile": folder / "known"}
    (folder / "ssh_config").write_text("".join(f"{k} {v}\n" for k, v in client.items()))
    for host in hosts:
        # The host's own view of /etc: nobody else sees it.
        host.run("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
        listening = host.start(shutil.which("sshd"), "-D", "-e", "-f", folder / "sshd_config")
        listening.wait_for("Server listening")


def srun(hosts: tuple[Host, Host], *arguments: object, **variables: object) -> list[Started]:
    """train.py as four tasks with the variables that Slurm would set."""
    job = {
        "SLURM_JOB_ID": 4711,
        "SLURM_JOB_NODELIST": ",".join(NAMES),
        "SLURM_NTASKS": 4,
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_ID": 0,
    }
    return [
        hosts[rank // 2].start(
            *(sys.executable, "train.py", *arguments),
            **job | variables,
            SLURM_PROCID=rank,
            SLURM_NODEID=rank // 2,
            SLURM_LOCALID=rank % 2,
        )
        for rank in range(4)
    ]


@pytest.mark.slow
def test_the_variables_of_srun(
    hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path, on_one_host: list[float]
) -> None:
    started = srun(hosts, *FLAGS, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    assert_same_curve(started, tmp_path, on_one_host)


@pytest.mark.slow
def test_hosts_whose_own_name_means_the_loopback(
    hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path, on_one_host: list[float]
) -> None:
    """As on many systems; and nobody says which interface to use."""
    table = tmp_path / "hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"127.0.1.1 {name}\n" for name in NAMES))
    for host in hosts:
        host.run("mount", "--bind", table, "/etc/hosts")
    flags = (*FLAGS, "--data-dir", tiny_shards, "--output-dir", tmp_path / "out")
    address = {"MASTER_ADDR": hosts[0].address, "GLOO_SOCKET_IFNAME": None}
    assert_same_curve(srun(hosts, *flags, **address), tmp_path / "out", on_one_host)


@pytest.mark.slow
def test_preflight_knows_hosts_apart(
    hosts: tuple[Host, Host], tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--data-dir", tiny_shards, "--output-dir", tmp_path / "out", "--preflight")
    outcomes = wait_all(srun(hosts, *flags))
    said = outcomes[0].output
    assert [status for status, _ in outcomes] == [0] * 4, said
    assert not any("process(es)" in output for _, output in outcomes[1:])
    assert "4 process(es) on 2 host(s)" in said
    assert re.search(r"^0-1 +host-a +CPU .*\n2-3 +host-b +CPU ", said, re.MULTILINE), said
    assert re.search(r"process +within a host \(2\) +all processes \(4\)$", said, re.MULTILINE), (
        said
    )
    # A disk of its own under the same name, as many clusters have.
    (tmp_path / "out").mkdir()
    hosts[1].run("mount", "-t", "tmpfs", "tmpfs", tmp_path / "out")
    outcomes = wait_all(srun(hosts, *flags))
    assert [status for status, _ in outcomes] == [2] * 4
    expected = (
        f"rank 2 on host-b: --output-dir {tmp_path}/out is another folder here than on rank 0"
    )
    assert expected in outcomes[0].output
