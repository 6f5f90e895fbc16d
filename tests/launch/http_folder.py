"""A web server for tests: a folder over HTTP on 127.0.0.1, with faults to order."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

Fault = str
"""What goes wrong with one answer:

- ``"500"``, ``"503"``, ``"404"`` …: that status and no file
- ``"drop N"``: the connection is closed after N bytes, fewer than were announced
- ``"short N"``: N bytes, announced as if they were all
- ``"wrong"``: the right number of bytes, the last one changed
- ``"long"``: a byte too many
- ``"no range"``: the whole file whatever part was asked for; also ``"no range, drop N"``
- ``"silent"``: nothing at all until the server stops
- ``"to URL"``: the file is at another address
- ``""``: as it should be

Attempts are counted from 0 for each name; who asks for one byte alone asks for ``"probe of NAME"``.
"""


class Request(NamedTuple):
    name: str
    start: int
    query: str = ""
    authorization: str = ""
    probe: bool = False
    """Whether its first byte alone was asked for."""


class FaultyFolder:
    """``url`` serves ``folder``; ``fault(name, attempt)``, attempts from 0, says what goes wrong.

    ``requests`` lists what was asked for; ``tag(path)`` gives the ETag, None for none.
    """

    def __init__(self, folder: Path, fault: Callable[[str, int], Fault]) -> None:
        self.folder, self.fault = folder, fault
        self.tag: Callable[[Path], str | None] = _by_time
        self.requests: list[Request] = []
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    owner.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/data"

    def count(self, name: str) -> int:
        """How often a file was asked for; of one byte, for what the answer says of it, not."""
        return sum(r.name == name and not r.probe for r in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        path_asked, _, query = handler.path.partition("?")
        name = path_asked.rpartition("/")[2]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        probe = asked is not None and asked[2] == "0"
        what = f"probe of {name}" if probe else name
        with self._lock:
            attempt = self._attempts[what]
            self._attempts[what] += 1
            authorization = handler.headers.get("Authorization", "")
            self.requests.append(Request(name, start, query, authorization, probe))
        fault = self.fault(what, attempt)
        path = self.folder / name
        if fault == "silent":
            self.stopping.wait()
            return
        if fault.startswith("to "):
            handler.send_response(302)
            handler.send_header("Location", fault.removeprefix("to "))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if asked and path.is_file() and path.stat().st_size == 0:
            handler.send_response(416)
            handler.send_header("Content-Range", "bytes */0")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault.isdigit() or not path.is_file():
            handler.send_response(int(fault) if fault.isdigit() else 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = path.read_bytes()
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "long":
            content += b"x"
        if asked and "no range" not in fault:
            handler.send_response(206)
            end = min(int(asked[2] or len(content) - 1), len(content) - 1)
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            content = content[start : end + 1]
        else:
            handler.send_response(200)
        tag = self.tag(path)
        if tag is not None:
            handler.send_header("ETag", tag)
        limit = re.search(r"(drop|short) (\d+)", fault)
        sent = content[: int(limit[2])] if limit else content
        announced = sent if limit and limit[1] == "short" else content
        handler.send_header("Content-Length", str(len(announced)))
        handler.end_headers()
        handler.wfile.write(sent)

    def __enter__(self) -> FaultyFolder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _by_time(path: Path) -> str:
    status = path.stat()
    return f'"{status.st_size}-{status.st_mtime_ns}"'


@contextlib.contextmanager
def served(
    folder: Path, fault: Callable[[str, int], Fault] = lambda name, attempt: ""
) -> Iterator[FaultyFolder]:
    """A folder over HTTP for as long as the block lasts."""
    with FaultyFolder(folder, fault) as server:
        yield server
