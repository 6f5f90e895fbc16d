"""Whatever a web server answers, a file arrives or a message says why not: soon, and in little
memory."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pickle
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moco_scale.data.open import data_set, open_shards
from moco_scale.data.remote import download, fsspec_store, http_connection, shard_source
from moco_scale.data.remote.download import RemoteFile, RetryPolicy, download_document, state_of
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards.index_file import INDEX_DTYPE, rows_checksum
from moco_scale.utils.errors import UserError

ONCE = RetryPolicy(give_up=0.0)
Answer = Callable[[str], Iterator[bytes]]
"""The pieces of an answer to a request for a path; after the last the connection is closed."""


class Raw(NamedTuple):
    url: str
    answers: list[Answer]
    """The last one counts."""


@pytest.fixture(scope="module")
def raw() -> Iterator[Raw]:
    """A server that sends what it is told to, byte for byte, until nobody listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Raw(f"http://127.0.0.1:{listener.getsockname()[1]}/d", [])

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                if not (more := connection.recv(65536)):
                    return
                asked += more
            path = asked.split(b" ")[1].decode("latin-1")
            for piece in server.answers[-1](path):
                connection.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield server
    listener.close()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(http_connection, "SILENCE", 0.5)
    monkeypatch.setattr(http_connection, "DOCUMENT_SECONDS", 1.0)
    monkeypatch.setattr(shard_source, "RetryPolicy", lambda give_up: ONCE)
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "home"))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Some hundred MB may be allocated within."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fetched(raw: Raw, answer: Answer, most: int | None = 10**6) -> bytes:
    raw.answers.append(answer)
    content = io.BytesIO()
    store = fsspec_store.store_at(raw.url)
    download_document(store, RemoteFile("index.json", most=most), content, ONCE, 5.0)
    return content.getvalue()


def whole(text: str | bytes) -> Answer:
    content = text.encode("latin-1") if isinstance(text, str) else text
    return lambda path: iter([content])


def refusal(raw: Raw, answer: Answer, most: int | None = 10**6) -> str:
    with pytest.raises(UserError) as caught:
        fetched(raw, answer, most)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


NUMBERS = (
    "5\x1d",
    "\x1f5",
    *("0", "3", "-1", "\xb2", "\xbd", "1_0", "0x3", "+3", "nan", "inf", "1e3", " 3 ", "3,3", ""),
    *("9" * 30, "9" * 5000),
)
STATUSES = (
    *("HTTP/1.1 200 OK", "HTTP/1.1 200 OK", "HTTP/1.0 206 Partial", "HTTP/1.1 204 x"),
    *("HTTP/1.1 416 x", "HTTP/1.1 503 x", "HTTP/1.1 101 x", "HTTP/1.1 302 x", "HTTP/1.1 000"),
    *("HTTP/9.9 200 OK", "ICY 200 OK", "HTTP/1.1 2_0_0 OK", "HTTP/1.1 \xb2\xb2\xb2 x", "", "\0"),
    *("x" * 70000, "HTTP/1.1 500 \x1b[2J\x85\u00ad" + "y" * 60000, "HTTP/1.1 999999999999 x"),
)
RANGES = (
    *("bytes 0-2/3", "bytes */0", "bytes 0-0/*", "bytes \xb2-3/3", "x"),
    *(f"bytes 0-0/{number}" for number in NUMBERS),
    *(f"bytes {number}-0/3" for number in NUMBERS),
)
LOCATIONS = (
    *("http://[::1", "http://127.0.0.1:99999999/", "file:///etc/passwd", "//", "", "ftp://x"),
    *("http://\x1b/", "http://a b/", "data:,x", "javascript:x", f"http://{'x' * 300}.invalid/"),
)
SOME_TEXT = st.text(st.characters(max_codepoint=255), max_size=30)
HEADERS = {
    ("Content-Length", "Retry-After", "Age"): st.sampled_from(NUMBERS),
    ("Content-Range",): st.sampled_from(RANGES),
    ("Transfer-Encoding",): st.sampled_from(["chunked", "Chunked", "gzip", "x"]),
    ("Content-Encoding",): st.sampled_from(["gzip", "br", "identity", "\x1b"]),
    ("Location",): st.sampled_from(LOCATIONS),
    ("ETag", "Last-Modified", "X", "\x1b", ""): SOME_TEXT,
}
HEADER = st.one_of([st.tuples(st.sampled_from(names), HEADERS[names]) for names in HEADERS])
BODIES = (
    *(b"3\r\nabc\r\n0\r\n\r\n", b"-5\r\nabc", b"\xb2\r\n", b"F" * 40 + b"\r\nabc", b"3", b"abc"),
    *(b"3;" + b"x" * 70000, b"3\r\nabc\r\n0\r\n" + b"X: y\r\n" * 2000),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(STATUSES) | SOME_TEXT,
    st.lists(HEADER, max_size=4),
    st.sampled_from(BODIES) | st.binary(max_size=10),
)
def test_an_odd_answer_is_a_file_or_a_message(
    raw: Raw, status: str, headers: list[tuple[str, str]], body: bytes
) -> None:
    head = "\r\n".join([status, *(f"{name}: {value}" for name, value in headers), "", ""])
    answer = whole(head.encode("latin-1") + body)
    with contextlib.suppress(UserError):
        assert len(fetched(raw, answer)) <= len(body)
    with contextlib.suppress(UserError):
        state = state_of(fsspec_store.store_at(raw.url), RemoteFile("x"), ONCE)
        assert state.bytes is None or 0 <= state.bytes <= 2**50
        assert state.tag.isprintable() and len(state.tag) + len(state.changed) <= 2000


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("HTTP/1.1 500 \x1b[2J\x1b]0;x\x07" + "y" * 60000, r"HTTP 500 \\x1b\[2J\\x1b\]0;x\\x07yy"),
        ("HTTP/1.1 403 http://me:secret@h/?secret", "HTTP 403 http://h"),
        ("HTTP/1.1 503 x\r\nRetry-After: \xb2", "HTTP 503"),
        ("HTTP/1.1 503 x\r\nRetry-After: " + "9" * 400, "HTTP 503"),
        (
            "HTTP/1.1 200 OK\r\nContent-Encoding: gzip",
            "compressed .gzip., which it was asked not to",
        ),
        ("HTTP/1.1 204 No", "HTTP 204, which brings no file"),
        ("HTTP/1.1 206 x\r\nContent-Range: bytes " + "9" * 5000 + "-1/*", "another part"),
        ("HTTP/1.1 302 x\r\nLocation: file:///etc/passwd", "not allowed"),
        ("HTTP/1.1 302 x\r\nLocation: ftp://127.0.0.1/x", "no web server"),
        ("HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:99999999/", "no web server"),
        ("HTTP/1.1 308 x", "HTTP 308"),
        ("\x1b[2J", r"\\x1b"),
        ("HTTP/1.1 200 OK" + "\r\nX: y" * 101, "more than 100 headers"),
        ("HTTP/1.1 200 OK" + "\r\nX: " + "y" * 70000, "LineTooLong"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(raw: Raw, status: str, words: str) -> None:
    message = refusal(raw, whole(f"{status}\r\n\r\n"))
    assert re.search(words, message) and "secret" not in message


def test_redirects_have_an_end_and_their_bodies_are_not_read(raw: Raw) -> None:
    def answer(path: str) -> Iterator[bytes]:
        number = int(path.rpartition("/")[2]) + 1 if path[-1].isdigit() else 0
        yield f"HTTP/1.1 302 x\r\nLocation: /{number}\r\n\r\n".encode()
        yield from itertools.repeat(bytes(1 << 20))

    assert "on and on" in refusal(raw, answer)

    def same(path: str) -> Iterator[bytes]:
        yield f"HTTP/1.1 302 x\r\nLocation: {path}\r\n\r\n".encode()

    assert "on and on" in refusal(raw, same)


def dripping(beginning: bytes, piece: bytes = b"y") -> Answer:
    def answer(path: str) -> Iterator[bytes]:
        yield beginning
        while True:
            time.sleep(0.05)
            yield piece

    return answer


def endless(beginning: bytes, piece: bytes) -> Answer:
    return lambda path: itertools.chain([beginning], itertools.repeat(piece))


@pytest.mark.parametrize(
    "answer",
    [
        dripping(b"HTTP/1.1 200 O"),
        dripping(b"HTTP/1.1 200 OK\r\nX: "),
        dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        endless(b"HTTP/1.1 200 OK\r\n", b"x" * 10000 + b"\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 1000),
    ],
    ids=["status", "header", "continue", "chunk", "continues", "headers", "trailers"],
)
def test_an_answer_that_does_not_get_to_its_body_is_given_up(raw: Raw, answer: Answer) -> None:
    assert "could not be fetched" in refusal(raw, answer)


def test_a_body_that_drips_is_given_up(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    monkeypatch.setattr(download, "_LOOK", 0.3)
    assert " bytes in " in refusal(raw, answer)  # 20 bytes a second
    monkeypatch.setattr(download, "_LOOK", 60.0)
    raw.answers.append(answer)
    with pytest.raises(UserError, match="not arrived within 0 s"):
        store, file = fsspec_store.store_at(raw.url), RemoteFile("index.json")
        download_document(store, file, io.BytesIO(), ONCE, 0.2)
    # Nor a shard, for all that it gets on each time.
    monkeypatch.setattr(download, "_LOOK", 0.3)
    with pytest.raises(UserError, match="given up after"):
        download.download(store, file, io.BytesIO(), RetryPolicy(0.5, 0.01, 0.01))


OK = b"HTTP/1.1 200 OK\r\n\r\n"


def test_an_index_without_an_end_takes_little_memory(
    raw: Raw, tmp_path: Path, little_memory: None
) -> None:
    raw.answers.append(endless(OK, b" " * (1 << 20)))
    source = ShardSource(raw.url, str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"index\.json does not end: more than 33,554,432 bytes"):
        open_shards(source, "train")


def index_of(rows: np.ndarray, shards: list[dict[str, object]], **more: object) -> bytes:
    samples = sum(int(str(shard["samples"])) for shard in shards)
    split = {"samples": samples, "checksum": rows_checksum(rows), "shards": shards, **more}
    header = {
        "format": "moco_scale shards",
        "version": 1,
        "classes": [],
        "splits": {"train": split},
    }
    return json.dumps(header).encode()


def a_row() -> np.ndarray:
    return np.array([(0, 512, 100, -1)], INDEX_DTYPE)


@pytest.mark.parametrize(("samples", "words"), [(1, "more than the 1 s"), (2**40, "speaks of")])
def test_rows_without_an_end_take_neither_memory_nor_disk(
    raw: Raw, tmp_path: Path, samples: int, words: str, little_memory: None
) -> None:
    shard = {"name": "x.tar", "bytes": 10240, "samples": samples}

    def answer(path: str) -> Iterator[bytes]:
        if path.endswith("index.json"):
            return iter([OK, index_of(a_row(), [shard])])
        return endless(OK, bytes(1 << 20))(path)

    raw.answers.append(answer)
    with pytest.raises(UserError, match=words):
        open_shards(ShardSource(raw.url, str(tmp_path / "cache")), "train")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2000


def test_a_tar_without_an_end_stops_at_the_limit_of_the_cache(raw: Raw, tmp_path: Path) -> None:
    raw.answers.append(endless(OK, bytes(1 << 16)))
    spec = raw.url + "/train-{0..5}.tar"
    with pytest.raises(UserError, match=r"tar does not end: .* --shard-cache-size is 0\.003 GB"):
        data_set(ShardSource(spec, str(tmp_path / "cache"), cache_size=0.003)).index()
    kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(kept) < 3_000_000


def test_nothing_is_written_where_a_server_says(raw: Raw, tmp_path: Path) -> None:
    """A version that leads out of the cache, and a scan that names a file, are not looked at."""
    there = tmp_path / "home.txt"
    there.write_text("mine")
    tar = bytes(10240)
    for version in (f"/../../../../{there.name}", str(there), "/../x", "..", "\0", 7):
        shard = {"name": "x.tar", "bytes": len(tar), "samples": 1, "version": version}
        content = io.BytesIO()
        np.save(content, a_row())
        index = index_of(a_row(), [shard | {"scan": str(there)}], scan=str(there), index="../../x")
        files = {"index.json": index, "train-index.npy": content.getvalue(), "x.tar": tar}
        raw.answers.append(lambda path: iter([OK, files[path.rpartition("/")[2]]]))  # noqa: B023
        shards = open_shards(ShardSource(raw.url, str(tmp_path / "cache")), "train")
        assert bytes(shards.read(0)) == bytes(100)
    made = {str(path.relative_to(tmp_path)).partition("/")[0] for path in tmp_path.rglob("*")}
    assert made == {"cache", there.name} and there.read_text() == "mine"
    assert {path.name for path in (tmp_path / "cache").rglob("*.tar*")} == {"x.tar"}


def test_a_place_can_be_sent_to_the_process_that_fetches_ahead(raw: Raw) -> None:
    raw.answers.append(whole(OK + b"abc"))
    store = pickle.loads(pickle.dumps(fsspec_store.store_at(raw.url)))
    content = io.BytesIO()
    download_document(store, RemoteFile("x"), content, ONCE, 5.0)
    assert content.getvalue() == b"abc"


def test_a_start_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and without the password; where nobody listens that is minutes."""
    monkeypatch.setattr(download, "_SAID_AFTER", 0.0)
    retry = download.RetryPolicy(give_up=0.5, first_wait=0.02)
    nobody = fsspec_store.store_at("http://joe:secret@127.0.0.1:1/data")
    with pytest.raises(UserError, match="refused"):
        download.state_of(nobody, download.RemoteFile("index.json"), retry)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "127.0.0.1:1/data/index.json" in said and "refused" in said
    assert "--shard-timeout" in said and "secret" not in said
