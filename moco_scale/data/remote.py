"""Where files can be fetched from: HTTP, object stores, and commands that the user has allowed.

A place is asked for a file by name, from some byte on, and gives its bytes or says what went wrong
and whether trying again can help. It neither retries nor checks what it gets: `download` does.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import shlex
import signal
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from moco_scale.data.remote_addresses import PIPE, SCHEME, scrubbed, shown
from moco_scale.errors import UserError

EXTRA = "pip install 'moco_scale[remote]'"
_SILENCE = 60.0  # seconds without a byte after which a connection counts as broken
_CHUNK = 1 << 20
_AUTHORIZATION = "Authorization"
# What may stand in a path or after its ?, a % of the user's own included.
_SAFE = "/%:@!$&'()*+,;=~"
# Statuses that tell of the moment rather than of the file.
_PASSING = {408, 423, 425, 429, 500, 502, 503, 504}


class FetchError(Exception):
    """A file did not arrive.

    Attributes:
        passing: whether trying again can help.
        wait: seconds the server asks for before the next attempt; 0: it did not say.
    """

    def __init__(self, message: str, *, passing: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.passing, self.wait = passing, wait


class FileState(NamedTuple):
    """What a place says of a file without sending it; None and "" where it does not say."""

    bytes: int | None = None
    tag: str = ""
    """Of its content: an ETag, a generation."""
    changed: str = ""
    """When it was."""

    def same(self, other: FileState) -> bool:
        """Whether nothing speaks for a change. Servers that share the work may give tags, or
        times, of their own: one of the two is enough."""
        if self.bytes != other.bytes:
            return False
        pairs = [(self.tag, other.tag), (self.changed, other.changed)]
        known = [one == two for one, two in pairs if one and two]
        return any(known) or not known


class Body(ABC):
    """The bytes of a file from `start` on.

    Attributes:
        start: where they begin: as asked for, or 0 where the place can only send all.
        total: size of the whole file; None when unknown.
    """

    start: int = 0
    total: int | None = None

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """Them, up to the end or until the connection ends: a body may be short.

        Raises FetchError.
        """


class Place(ABC):
    """A folder elsewhere."""

    @abstractmethod
    def address(self, name: str) -> str:
        """Where a file is, for messages: without passwords and signatures."""

    @abstractmethod
    def open(self, name: str, start: int) -> contextlib.AbstractContextManager[Body]:
        """A file's bytes from `start` on. Raises FetchError."""

    def state(self, name: str) -> FileState:
        """What is known of a file without fetching it. Raises FetchError."""
        return FileState()


def place(spec: str, allow_pipe: bool) -> Place:
    """What a user's address stands for; nothing is fetched yet.

    Raises UserError: no such protocol, a library is not installed, or a command without permission.
    """
    if spec.startswith(PIPE):
        return CommandPlace(spec, allow_pipe)
    match = SCHEME.match(spec)
    if match is None:
        raise ValueError(f"{spec} is no address")
    if match[1].lower() in ("http", "https"):
        return HttpPlace(spec)
    return FsspecPlace(spec)


class HttpPlace(Place):
    """``https://[user:password@]host/path[?signature]``; the signature is sent for every file.

    Redirects are followed and the usual proxy variables (https_proxy, no_proxy) obeyed.
    """

    def __init__(self, spec: str) -> None:
        parts = urllib.parse.urlsplit(spec)
        if not parts.hostname:
            raise UserError(f"--data-dir {shown(spec)}: there is no host in this address")
        try:
            _ = parts.port
        except ValueError:
            raise UserError(f"--data-dir {shown(spec)}: the host has a port that is none") from None
        self._parts, self._shown = parts, shown(spec).rstrip("/")
        self._headers = {"User-Agent": "moco_scale", "Accept-Encoding": "identity"}
        self._opener = urllib.request.build_opener(_Redirects)
        self._authorization: str | None = None
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:"
            pair += urllib.parse.unquote(parts.password or "")
            self._authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"

    def address(self, name: str) -> str:
        return f"{self._shown}/{name}"

    def _url(self, name: str) -> str:
        folder = urllib.parse.quote(self._parts.path.rstrip("/"), safe=_SAFE)
        query = urllib.parse.quote(self._parts.query, safe=f"{_SAFE}?")
        path, host = f"{folder}/{urllib.parse.quote(name)}", self._parts.netloc.rpartition("@")[2]
        return urllib.parse.urlunsplit((self._parts.scheme, host, path, query, ""))

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        with self._answer(name, {"Range": f"bytes={start}-"} if start else {}) as answer:
            yield _HttpBody(answer, start)

    def state(self, name: str) -> FileState:
        # Not HEAD, which an address that is signed for reading may refuse.
        with self._answer(name, {"Range": "bytes=0-0"}) as answer:
            headers = answer.headers
            return FileState(
                _HttpBody(answer, 0).total,
                headers.get("ETag", ""),
                headers.get("Last-Modified", ""),
            )

    @contextlib.contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[Any]:
        request = urllib.request.Request(self._url(name), headers=self._headers | headers)
        if self._authorization is not None:
            request.add_unredirected_header(_AUTHORIZATION, self._authorization)
        try:
            answer = self._opener.open(request, timeout=_SILENCE)
        except urllib.error.HTTPError as error:
            with error:
                raise _http_error(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchError(_network_reason(error)) from None
        with answer:
            yield answer


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Takes a password along to the same server alone: others are none of the user's."""

    def redirect_request(
        self, req: urllib.request.Request, *answer: Any
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, *answer)
        password = req.unredirected_hdrs.get(_AUTHORIZATION)
        if request is not None and password is not None:
            before, after = _server(req.full_url), _server(request.full_url)
            secured = (before[0], before[2], after[0], after[2]) == ("http", 80, "https", 443)
            if before == after or (secured and before[1] == after[1]):
                request.add_unredirected_header(_AUTHORIZATION, password)
        return request


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _HttpBody(Body):
    def __init__(self, answer: Any, start: int) -> None:
        self._answer = answer
        length = answer.headers.get("Content-Length")
        if answer.status == http.client.PARTIAL_CONTENT:
            found = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip()
            )
            if found is None or int(found[1]) != start:
                raise FetchError("the server sent another part than it was asked for")
            self.start = start
            self.total = None if found[2] == "*" else int(found[2])
        elif length is not None and length.isdigit():
            self.total = int(length)

    def chunks(self) -> Iterator[bytes]:
        try:
            while chunk := self._answer.read1(_CHUNK):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(_network_reason(error)) from None


def _http_error(error: urllib.error.HTTPError) -> FetchError:
    headers: Any = error.headers or {}
    if error.code == 416 and headers.get("Content-Range", "").replace(" ", "") == "bytes*/0":
        return FetchError("it is empty: 0 bytes", passing=False)
    asked = headers.get("Retry-After", "")
    wait = float(asked) if asked.isdigit() else 0.0
    passing = error.code in _PASSING
    return FetchError(
        f"HTTP {error.code} {scrubbed(str(error.reason))}", passing=passing, wait=wait
    )


def _network_reason(error: BaseException) -> str:
    """One line without addresses, so that equal failures read alike."""
    cause = getattr(error, "reason", error)  # what URLError wraps
    if isinstance(cause, TimeoutError):
        return f"no answer for {_SILENCE:.0f} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = scrubbed(str(cause))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class FsspecPlace(Place):
    """``s3://bucket/path``, ``gs://bucket/path`` and whatever else fsspec knows.

    Credentials are those of the library behind it: environment, profile, instance role.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec.rstrip("/")
        self._system, self._process = _file_system(self._spec), os.getpid()

    def __getstate__(self) -> str:
        return self._spec

    def __setstate__(self, spec: str) -> None:
        self.__init__(spec)  # type: ignore[misc]

    def _file_system(self) -> Any:
        if self._process != os.getpid():  # their connections do not survive a fork
            self._system, self._process = _file_system(self._spec), os.getpid()
        return self._system

    def address(self, name: str) -> str:
        return f"{shown(self._spec)}/{name}"

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        with contextlib.ExitStack() as stack:
            try:
                file = self._file_system().open(
                    f"{self._spec}/{name}", "rb", block_size=16 << 20, cache_type="readahead"
                )
                stack.enter_context(file)
                body = _FileBody(file, start)
            except Exception as error:
                raise _store_error(error) from None
            yield body

    def state(self, name: str) -> FileState:
        try:
            found = self._file_system().info(f"{self._spec}/{name}")
        except Exception as error:
            raise _store_error(error) from None

        def first(*keys: str) -> str:
            return next((str(found[key]) for key in keys if found.get(key)), "")

        size = found.get("size")
        return FileState(
            size if isinstance(size, int) else None,
            first("ETag", "etag", "generation", "md5Hash"),
            first("LastModified", "last_modified", "updated", "mtime"),
        )


class _FileBody(Body):
    def __init__(self, file: Any, start: int) -> None:
        self._file, self.start = file, start
        size = getattr(file, "size", None)
        self.total = size if isinstance(size, int) else None
        file.seek(start)

    def chunks(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = self._file.read(_CHUNK)
            except Exception as error:
                raise _store_error(error) from None
            if not chunk:
                return
            yield chunk


def _store_error(error: Exception) -> FetchError:
    """The libraries behind fsspec raise whatever theirs raise; what they mean by it is in these."""
    lasting = isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)
    lasting |= type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {scrubbed(text[0])[:200]}" if text else type(error).__name__
    return FetchError(reason, passing=not lasting)


def _file_system(spec: str) -> Any:
    protocol = spec.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise UserError(
            f"--data-dir {shown(spec)}: {protocol}:// needs fsspec; install it with: {EXTRA}"
        ) from None
    try:
        # Not one that fsspec keeps, which would be the same again after a fork.
        return fsspec.filesystem(protocol, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(
            f"--data-dir {shown(spec)}: {error}. For s3:// and gs:// install: {EXTRA}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"--data-dir {shown(spec)}: {error}. Name a folder, or an address that begins with "
            "https://, http://, s3:// or gs://"
        ) from None


class CommandPlace(Place):
    """``pipe:COMMAND`` whose output is the file; ``{}`` in it stands for the file's name.

    A command runs in a shell, so it comes from the command line alone, with permission. Names come
    from an index: one that means anything to a shell is refused.
    """

    def __init__(self, spec: str, allowed: bool) -> None:
        self._command = spec.removeprefix(PIPE).strip()
        if not allowed:
            raise UserError(
                f"--data-dir {shown(spec)}: this runs a command in a shell for every shard, which "
                "is done only with --allow-pipe; give it if you trust the command"
            )
        if "{}" not in self._command:
            raise UserError(
                f"--data-dir {shown(spec)}: write {{}} where a file's name belongs, as in "
                "'pipe:aws s3 cp s3://bucket/folder/{} -'"
            )

    def address(self, name: str) -> str:
        return scrubbed(f"{PIPE}{self._command.replace('{}', name)}")

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        if shlex.quote(name) != name:  # inside the user's own quotes, ours would protect nothing
            raise FetchError("a shell would not take this name literally", passing=False)
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                self._command.replace("{}", name),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,  # so that all it has started can be ended
            )
            try:
                yield _CommandBody(process, complaints)
            finally:
                assert process.stdout is not None
                process.stdout.close()
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                process.wait()


class _CommandBody(Body):
    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[bytes]) -> None:
        self._process, self._complaints = process, complaints

    def chunks(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        while chunk := self._process.stdout.read(_CHUNK):
            yield chunk
        status = self._process.wait()
        if status:
            self._complaints.seek(0)
            lines = self._complaints.read().decode(errors="replace").strip().splitlines()
            said = f": {scrubbed(lines[-1])[:200]}" if lines else ""
            raise FetchError(f"the command ended with status {status}{said}")
