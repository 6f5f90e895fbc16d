"""The way to rank 0's store: found, or named in words within seconds."""

import socket

import pytest

from moco_scale.distributed import rendezvous
from moco_scale.utils.errors import UserError


def environ(host: str, port: int = 0, local: str = "") -> dict[str, str]:
    words = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "1"}
    return words | {"LOCAL_WORLD_SIZE": local}


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, "a..b", "-\u00e9\ud800"])
def test_a_name_that_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.0)
    for way in (
        lambda: rendezvous.reach(environ(host, 1), 1.0),
        lambda: rendezvous.listen(environ(host)),
    ):
        with pytest.raises(UserError, match=r"MASTER_ADDR=.* is an unknown host"):
            way()


def test_a_port_that_nobody_listens_at(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # and does not listen
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot reach rank 0 at 127.0.0.1:{port} .*refused"):
            rendezvous.reach(environ("127.0.0.1", port), 0.0)
        holder.listen()
        rendezvous.reach(environ("127.0.0.1", port), 0.0)


def test_the_store_listens_where_it_is_reached_and_nowhere_else() -> None:
    for host, local, bound in (
        ("127.0.0.1", "", "127.0.0.1"),
        ("localhost", "2", None),  # either family
        ("localhost", "1", ""),  # of several hosts: a name means more
        ("192.0.2.200", "", ""),  # of no interface here: a machine in between
    ):
        found = rendezvous.listen(environ(host, local=local))
        if bound == "":
            assert found is None
            continue
        assert found is not None
        with found:
            assert found.getsockname()[0] == (bound or found.getsockname()[0])
            assert found.getsockname()[0] in ("127.0.0.1", "::1")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(UserError, match="is taken: another run"):
            rendezvous.listen(environ("127.0.0.1", holder.getsockname()[1]))
