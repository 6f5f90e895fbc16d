"""Where gloo listens when a host's own name means nothing but the loopback."""

import socket

import pytest

from moco_scale.distributed import network_interface
from moco_scale.distributed.network_interface import interface_to, name_interface

FAR = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-a"}


def named(monkeypatch: pytest.MonkeyPatch, own: str, **routes: str) -> dict[str, str]:
    """Interfaces by address, and what this host's own name means."""
    monkeypatch.setattr(network_interface, "interface_to", {k: v for k, v in routes.items()}.get)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: own)
    environ = dict(FAR)
    name_interface(environ)
    return environ


def test_a_name_that_means_an_address_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(monkeypatch, "10.0.0.7", **{"node-a": "eth0"}) == FAR


def test_the_interface_to_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = {"node-a": "ib0", "192.0.2.1": "eth0"}
    assert named(monkeypatch, "127.0.1.1", **routes)["GLOO_SOCKET_IFNAME"] == "ib0"
    # On rank 0's own host that is the loopback: the default route's, then.
    assert named(monkeypatch, "127.0.1.1", **{"192.0.2.1": "eth0"})["GLOO_SOCKET_IFNAME"] == "eth0"
    assert named(monkeypatch, "127.0.1.1") == FAR


def test_who_knows_better_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_interface, "interface_to", lambda host: "eth0")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    for environ in (
        FAR | {"GLOO_SOCKET_IFNAME": "ib1"},
        FAR | {"LOCAL_WORLD_SIZE": "4"},  # one host
        {"RANK": "0"},
    ):
        before = dict(environ)
        name_interface(environ)
        assert environ == before


def test_interfaces_are_found() -> None:
    assert interface_to("127.0.0.1") is None
    assert interface_to("no-such-host.invalid") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert network_interface._address_of("lo", probe) == "127.0.0.1"
        assert network_interface._address_of("nothing", probe) is None
