"""Fuzz target: what a web server answers."""

from __future__ import annotations

import contextlib
import io
import socket
from pathlib import Path
from unittest import mock

from moco_scale.data.remote.download import RemoteFile, RetryPolicy, download_document, state_of
from moco_scale.data.remote.fsspec_store import store_at
from moco_scale.utils.errors import UserError

_ONCE = RetryPolicy(give_up=0.0)
_MOST = 1 << 16


def SEEDS() -> list[bytes]:
    """Return whole files and parts, chunks, errors with advice, redirects."""
    ok = b"HTTP/1.1 200 OK\r\n"
    return [
        ok + b'Content-Length: 5\r\nETag: "x"\r\nLast-Modified: Mon\r\n\r\nabcde',
        ok + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX: y\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + ok + b"Content-Encoding: identity\r\n\r\nabc",
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-0/5\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 416 x\r\nContent-Range: bytes */0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/x?y=z\r\n\r\n",
        b"HTTP/1.0 404 Not Found\r\n\r\n",
    ]


def run(data: bytes, folder: Path) -> None:
    """Fetch a document and ask for the state of a file; every connection brings the same bytes."""
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        connected = socket.create_connection

        def connect(*_: object, **__: object) -> socket.socket:
            ours = connected(server.getsockname())
            theirs = open_sockets.enter_context(server.accept()[0])
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the rest of a large one is left out
                theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            return ours

        open_sockets.enter_context(mock.patch("socket.create_connection", connect))
        there, file = store_at("http://me:secret@127.0.0.1/d"), RemoteFile("index.json", most=_MOST)
        content = io.BytesIO()
        with contextlib.suppress(UserError):
            download_document(there, file, content, _ONCE, 5.0)
        assert content.tell() <= _MOST
        with contextlib.suppress(UserError):
            found = state_of(there, file, _ONCE)
            assert found.bytes is None or 0 <= found.bytes < 2**50
