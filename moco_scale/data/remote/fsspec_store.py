"""Stores of an address: HTTP, and everything that fsspec reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from moco_scale.data.remote.addresses import SCHEME, refuse_command, shown
from moco_scale.data.remote.http_store import HttpStore
from moco_scale.data.remote.store import CHUNK, Body, FetchError, FileState, Store, said_by
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

EXTRA = "pip install 'moco_scale[remote]'"


def store_at(spec: str) -> Store:
    """Return the store of a user's address; nothing is fetched yet.

    Raises:
        UserError: The protocol is unknown, or a library is not installed.
    """
    refuse_command(spec)
    match = SCHEME.match(spec)
    if match is None:
        raise ValueError(f"{spec} is no address")
    if match[1].lower() in ("http", "https"):
        return HttpStore(spec)
    return FsspecStore(spec)


class FsspecStore(Store):
    """``s3://bucket/path``, ``gs://bucket/path`` and everything else that fsspec knows.

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
        return printable(f"{shown(self._spec)}/{name}", 1000)

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

        return FileState.said(
            found.get("size"),
            first("ETag", "etag", "generation", "md5Hash"),
            first("LastModified", "last_modified", "updated", "mtime"),
        )


class _FileBody(Body):
    def __init__(self, file: Any, start: int) -> None:
        self._file, self.start = file, start
        self.total = FileState.said(getattr(file, "size", None), "", "").bytes
        file.seek(start)

    def chunks(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = self._file.read(CHUNK)
            except Exception as error:
                raise _store_error(error) from None
            if not chunk:
                return
            yield chunk


def _store_error(error: Exception) -> FetchError:
    """Interpret an error of the libraries behind fsspec."""
    lasting = isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)
    lasting |= type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {said_by(text[0])}" if text else type(error).__name__
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
        return fsspec.core.url_to_fs(spec, skip_instance_cache=True)[0]
    except ImportError as error:
        raise UserError(
            f"--data-dir {shown(spec)}: {error}. For s3:// and gs:// install: {EXTRA}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"--data-dir {shown(spec)}: {error}. Name a folder, or an address that begins with "
            "https://, http://, s3:// or gs://"
        ) from None
    except Exception as error:  # some connect at once, and raise whatever theirs raise
        raise UserError(
            f"--data-dir {shown(spec)} cannot be reached: {type(error).__name__}: {said_by(error)}"
        ) from None
