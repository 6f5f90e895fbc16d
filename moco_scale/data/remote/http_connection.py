"""HTTP connections that end within a time and a size, whatever the server sends.

The standard library limits lines, their number, and the silence between two bytes. The rest is
bounded here: slow headers, answers that begin for ever, redirects with an endless body or to other
protocols.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
import urllib.parse
import urllib.request
from typing import Any

from moco_scale.data.remote.store import FetchError, said_by
from moco_scale.untrusted.limits import DOCUMENT_SECONDS, HEAD_BYTES

SILENCE = 60.0
"""Seconds without a byte after which a connection counts as broken."""
AUTHORIZATION = "Authorization"


class HeadTooLong(http.client.HTTPException):
    """Status line and headers without an end."""


class _Bounded(io.RawIOBase):
    """Bounded stream of a socket.

    Attributes:
        deadline: by `time.monotonic`, to wait for bytes.
        budget: bytes that may still be read.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Which keeps the socket open when urllib closes its own handle of it.
        self._file = sock.makefile("rb", buffering=0)
        self.deadline = time.monotonic() + DOCUMENT_SECONDS
        self.budget: float = HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.budget <= 0:
            raise HeadTooLong(f"headers of more than {HEAD_BYTES:,} bytes")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(min(left, SILENCE))
        count = self._file.readinto(buffer)
        self.budget -= count or 0
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class Response(http.client.HTTPResponse):
    """Answer whose head has to arrive whole within a time."""

    def __init__(self, sock: socket.socket, *args: Any, **keywords: Any) -> None:
        super().__init__(sock, *args, **keywords)
        self.fp.close()
        self._bounded = _Bounded(sock)
        self.fp = io.BufferedReader(self._bounded, 1 << 16)

    def begin(self) -> None:
        super().begin()
        self._bounded.budget = float("inf")

    def some(self, size: int) -> bytes:
        """Return the next bytes of the body as soon as there are any; b"" at its end."""
        self._bounded.deadline = time.monotonic() + SILENCE
        return self.read1(size)


class _Connection(http.client.HTTPConnection):
    response_class = Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_SecureConnection), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows ten redirects at most, to web servers only.

    Sends a password to the same server only.
    """

    def http_error_302(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any
    ) -> Any:
        fp.close()  # its body would be read to an end that there may not be
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)  # type: ignore[arg-type]

    inf_msg = "it sends on and on; in the end: "
    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not _is_web_server(newurl):
            raise FetchError(
                f"the server sends on to {said_by(newurl)}, which is no web server", passing=False
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        password = req.unredirected_hdrs.get(AUTHORIZATION)
        if request is not None and password is not None:
            before, after = _server(req.full_url), _server(request.full_url)
            secured = (before[0], before[2], after[0], after[2]) == ("http", 80, "https", 443)
            if before == after or (secured and before[1] == after[1]):
                request.add_unredirected_header(AUTHORIZATION, password)
        return request


def _is_web_server(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # beyond 65535 it would be taken for another
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def opener() -> urllib.request.OpenerDirector:
    """Make an opener of http:// and https:// only, with the usual proxy variables."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Http(),
        _Https(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        director.add_handler(handler)
    return director
