"""Files of a web server."""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from moco_scale.data.remote import http_connection
from moco_scale.data.remote.addresses import shown
from moco_scale.data.remote.credentials import authorization, signature
from moco_scale.data.remote.http_connection import AUTHORIZATION, Response, opener
from moco_scale.data.remote.store import CHUNK, Body, FetchError, FileState, Store, said_by
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

# What may stand in a path or after its ?, a % of the user's own included.
_SAFE = "/%:@!$&'()*+,;=~"
# Statuses that tell of the moment rather than of the file.
_PASSING = {408, 423, 425, 429, 500, 502, 503, 504}
_NUMBER = re.compile(r"[0-9]{1,15}")  # \d and isdigit() know digits that int() does not
_PART = re.compile(r"bytes ([0-9]{1,15})-[0-9]{1,15}/([0-9]{1,15}|\*)")
_COMPRESSED = re.compile(r"gzip|deflate|compress|br\b|zstd", re.IGNORECASE)


class HttpStore(Store):
    """``https://[user:password@]host/path[?signature]``; the signature is sent for every file.

    Redirects are followed and the usual proxy variables (https_proxy, no_proxy) obeyed.
    """

    def __init__(self, spec: str) -> None:
        try:
            parts = urllib.parse.urlsplit(spec)
            _ = parts.port
        except ValueError:
            raise UserError(
                f"--data-dir {shown(spec)}: the host is none, or has a port that is none"
            ) from None
        if not parts.hostname:
            raise UserError(f"--data-dir {shown(spec)}: there is no host in this address")
        self._parts, self._shown = parts, shown(spec).rstrip("/")
        self._headers = {"User-Agent": "moco_scale", "Accept-Encoding": "identity"}
        self._query = signature(parts)
        self._authorization = authorization(parts)
        self._opener = opener()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opener"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opener=opener())

    def address(self, name: str) -> str:
        return printable(f"{self._shown}/{name}", 1000)

    def _url(self, name: str) -> str:
        folder = urllib.parse.quote(self._parts.path.rstrip("/"), safe=_SAFE)
        query = urllib.parse.quote(self._query, safe=f"{_SAFE}?")
        path, host = f"{folder}/{urllib.parse.quote(name)}", self._parts.netloc.rpartition("@")[2]
        return urllib.parse.urlunsplit((self._parts.scheme, host, path, query, ""))

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        with self._answer(name, {"Range": f"bytes={start}-"} if start else {}) as answer:
            yield _HttpBody(answer, start)

    def state(self, name: str) -> FileState:
        # Not HEAD, which an address that is signed for reading may refuse.
        with self._answer(name, {"Range": "bytes=0-0"}) as answer:
            size, headers = _HttpBody(answer, 0).total, answer.headers
            return FileState.said(size, headers.get("ETag"), headers.get("Last-Modified"))

    @contextlib.contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[Response]:
        try:
            request = urllib.request.Request(self._url(name), headers=self._headers | headers)
            if self._authorization is not None:
                request.add_unredirected_header(AUTHORIZATION, self._authorization)
            answer = self._opener.open(request, timeout=http_connection.SILENCE)
        except FetchError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            raise _http_error(error) from None
        # What servers send makes these libraries raise whatever theirs raise.
        except Exception as error:
            raise _network_error(error) from None
        with answer:
            yield answer


class _HttpBody(Body):
    def __init__(self, answer: Response, start: int) -> None:
        self._answer = answer
        headers = answer.headers
        encoding = headers.get("Content-Encoding", "")
        if _COMPRESSED.search(encoding):
            raise FetchError(
                f"the server sends it compressed ({said_by(encoding)}), which it was asked not to",
                passing=False,
            )
        if answer.status == http.client.PARTIAL_CONTENT:
            found = _PART.fullmatch(headers.get("Content-Range", "").strip())
            if found is None or int(found[1]) != start:
                raise FetchError("the server sent another part than it was asked for")
            self.start = start
            self.total = None if found[2] == "*" else int(found[2])
        elif answer.status != http.client.OK:
            raise FetchError(f"HTTP {answer.status}, which brings no file", passing=False)
        else:
            self.total = _number(headers.get("Content-Length", ""))

    def chunks(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = self._answer.some(CHUNK)
            except Exception as error:
                raise _network_error(error) from None
            if not chunk:
                return
            yield chunk


def _number(header: str) -> int | None:
    """Return the number in a header; None: it is none."""
    digits = header.strip(" \t")  # other white space is none to int(), or none of HTTP
    return int(digits) if _NUMBER.fullmatch(digits) else None


def _http_error(error: urllib.error.HTTPError) -> FetchError:
    headers: Any = error.headers or {}
    if error.code == 416 and headers.get("Content-Range", "").replace(" ", "") == "bytes*/0":
        return FetchError("it is empty: 0 bytes", passing=False)
    wait = float(_number(headers.get("Retry-After", "")) or 0)
    passing = error.code in _PASSING
    return FetchError(f"HTTP {error.code} {said_by(error.reason)}", passing=passing, wait=wait)


def _network_error(error: BaseException) -> FetchError:
    """Describe an error in one line without addresses, so that equal failures read alike."""
    cause = getattr(error, "reason", error)  # what URLError wraps
    if isinstance(cause, TimeoutError):
        return FetchError(f"no answer, or a stalled one, for {http_connection.SILENCE:.0f} s")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return FetchError(f"its certificate: {said_by(cause.verify_message)}", passing=False)
    if isinstance(cause, OSError) and cause.strerror:
        return FetchError(said_by(cause.strerror))
    text = said_by(cause)
    return FetchError(f"{type(error).__name__}: {text}" if text else type(error).__name__)
