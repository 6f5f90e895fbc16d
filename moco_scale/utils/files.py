"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What `flock` answers on file systems, of networks as a rule, that have no locks or have lost who
keeps them."""


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Replace a file by new content; a reader sees the old file or the new one, never a part.

    shared: others may write it at the same time; the last one's remains.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8) if shared else 'tmp'}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with _anew(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_atomically(path: Path, value: Any) -> None:
    """``torch.save`` to a file that appears whole."""
    import torch  # here: who fetches shards starts without it

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _anew(temporary) as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise


def _anew(path: Path) -> BinaryIO:
    """A new file in the place of what a killed process, or somebody's link, left there."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def failure_reason(error: BaseException) -> str:
    """One line that says why writing or reading failed, for people.

    torch's zip writer replaces the system's error by one about its own position, and
    ``torch.distributed.checkpoint`` wraps that once more, so the cause is looked for.
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
    """A number of bytes for people: "55.0 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
