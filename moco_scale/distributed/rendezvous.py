"""Rendezvous of processes at torch's store, and messages about what prevents it."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moco_scale.distributed.launchers import why_not_met
from moco_scale.distributed.restart_id import name_of_start
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log

RESOLVE_SECONDS = 30.0
"""Time that a name may stay unknown: a container's appears when it starts."""
_LOGGED_AFTER = 10.0  # seconds of waiting
_CONNECT_SECONDS = 5.0
_BACKLOG = 4096


def meet(environ: Mapping[str, str], timeout: timedelta) -> Any:
    """Return the store of all processes, once all have reached it.

    Args:
        environ: complete.
        timeout: time to wait for the last process, or for rank 0.

    Raises:
        UserError: The address or port is wrong.
        RuntimeError: torch failed.
    """
    number, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    logs = number == 0 or environ.get("LOCAL_RANK") == "0"
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own
        reach(environ, timeout.total_seconds(), logs)
        store = next(dist.rendezvous("env://", timeout=timeout))[0]
        return dist.PrefixStore(name_of_start(store, number, world), store)
    listening = None
    if number == 0:
        listening = listen(environ)
    else:
        reach(environ, timeout.total_seconds(), logs)
    return dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        world,
        is_master=number == 0,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=None if listening is None else listening.detach(),
    )


def resolve(host: str, logs: bool = False) -> list[tuple[int, str]]:
    """Resolve MASTER_ADDR to address families and addresses.

    Args:
        host: its name.
        logs: log that the name is waited for.

    Raises:
        UserError: The name stays unknown for :data:`RESOLVE_SECONDS`.
    """
    begun = time.monotonic()
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return [(family, str(address[0])) for family, *_, address in found]
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            what = f"MASTER_ADDR={host} is an unknown host ({why})"
            if time.monotonic() - begun > RESOLVE_SECONDS:
                raise UserError(
                    f"{what}: give the name or address of rank 0's host; `getent hosts NAME` "
                    "looks it up"
                ) from None
            if logs:
                log.info(f"{what}: trying for {RESOLVE_SECONDS:g} s")
                logs = False
            time.sleep(1.0)


def reach(environ: Mapping[str, str], seconds: float, logs: bool = False) -> None:
    """Wait until somebody listens at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: The name is unknown, or nobody listens.
    """
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    begun, met = time.monotonic(), ""
    addresses = resolve(host, logs)
    while True:
        for _, address in addresses:
            try:
                socket.create_connection((address, port), _CONNECT_SECONDS).close()
                return
            except OSError as error:
                met = error.strerror or str(error)
        waited = time.monotonic() - begun
        if waited > seconds:
            raise UserError(str(why_not_met(environ, f"failed to connect: {met}")))
        if logs and waited > _LOGGED_AFTER:
            logs = False
            log.info(
                f"waiting for rank 0 at {host}:{port}, {seconds / 60:.0f} minutes at most: {met}"
            )
        time.sleep(min(0.1 + waited / 10, 2.0))


def listen(environ: Mapping[str, str]) -> socket.socket | None:
    """Open a socket for rank 0's store that listens at MASTER_ADDR only.

    Returns None where it must listen on all interfaces: other hosts may resolve the name to
    another address, or the address is that of a machine in between.

    Raises:
        UserError: The port is taken or not permitted, or the name is unknown.
    """
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    one_host = environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE")
    for family, address in resolve(host, logs=True):
        if not one_host and address != host:
            return None
        here = socket.socket(family, socket.SOCK_STREAM)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind((address, port))
            here.listen(_BACKLOG)
            return here
        except OSError as error:
            here.close()
            if error.errno == errno.EADDRINUSE:
                raise UserError(str(why_not_met(environ, "EADDRINUSE"))) from None
            if error.errno != errno.EADDRNOTAVAIL:
                raise UserError(
                    f"cannot listen at {host}:{port}: {error.strerror or error}"
                ) from None
    return None
