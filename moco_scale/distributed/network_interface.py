"""Network interface that leads to the other processes."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import MutableMapping

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_ANYWHERE = "192.0.2.1"  # of no host: a route to it is the default route


def name_interface(environ: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would listen on the loopback, which no other host reaches.

    gloo takes the address of the host's own name, 127.0.1.1 on many systems. NCCL never takes the
    loopback by itself. Does nothing on a single host, where the variable is set, or where nothing
    better is found.
    """
    several_hosts = environ.get("LOCAL_WORLD_SIZE") != environ.get("WORLD_SIZE")
    if not several_hosts or environ.get("GLOO_SOCKET_IFNAME"):
        return
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    # On rank 0's host its own name is no help.
    for address in (environ.get("MASTER_ADDR"), _ANYWHERE):
        name = interface_to(address) if address else None
        if name is not None:
            environ["GLOO_SOCKET_IFNAME"] = name
            return


def interface_to(host: str) -> str | None:
    """Find the interface that leads to a host; None for the loopback, or when there is none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
            if not address.startswith("127."):
                for _, name in socket.if_nameindex():
                    if _address_of(name, probe) == address:
                        return name
    except OSError:  # no such host, or no way to it
        pass
    return None


def _address_of(interface: str, probe: socket.socket) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
    except OSError:  # it has no address
        return None
    return socket.inet_ntoa(answer[20:24])
