"""Files that are replaced atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `fsync` of a folder is answered on file systems that have none."""


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that replaces another, synced and whole, when the block ends.

    A reader sees the old file or the new one. Where the block fails, the old one stays.

    Args:
        path: of the file.
        shared: others may write it at the same time; the last one's remains.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8) if shared else 'tmp'}")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed, or somebody's link
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Replace a file by new content, as :func:`replacing` does."""
    with replacing(path, shared=shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def save_atomically(path: Path, value: Any) -> None:
    """Write a file by ``torch.save``, atomically."""
    import torch  # here: who fetches shards starts without it

    with replacing(path) as file:
        torch.save(value, file)


def require_writable(folder: Path) -> None:
    """Make a folder and check that files can be made in it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{secrets.token_hex(8)}.probe"
    with open(probe, "xb"):
        pass
    probe.unlink()


def sync(path: Path) -> None:
    """Make a file's content, or renames inside a folder, durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def failure_reason(error: BaseException) -> str:
    """Explain in one line why writing or reading failed.

    torch's zip writer replaces the system's error by one about its own position, and
    ``torch.distributed.checkpoint`` wraps that once more, so the cause is searched for.
    """
    # CheckpointException keeps what each rank met: {rank: (exception, traceback)}.
    pending = [error, *(e for e, _ in getattr(error, "failures", {}).values())]
    while pending:
        cause = pending.pop()
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        pending += [c for c in (cause.__cause__, cause.__context__) if c is not None]
    text = str(error).strip()
    if os.strerror(errno.ENOSPC) in text:
        return os.strerror(errno.ENOSPC)
    if "unexpected pos" in text:  # what is left of it when another rank met it
        return f"a write was cut short, most likely: {os.strerror(errno.ENOSPC)}"
    if not text:
        return type(error).__name__
    # What Python itself says of these is little without their name.
    named = isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError)
    return (f"{type(error).__name__}: " if named else "") + text.splitlines()[-1][:300]


def size_text(count: int) -> str:
    """Format a number of bytes: "55.0 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
