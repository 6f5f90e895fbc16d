"""Exceptions that a user is meant to see."""

import errno
import re
import resource
import socket

from moco_scale.utils.text import printable


class UserError(Exception):
    """Error that the user can fix: the message has what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with its status.

    Attributes:
        status: 2, or :data:`LOST_PEER` where nothing is the user's: start the same command again.
    """

    status = 2


# What gloo, NCCL and torch's store say when the process at the other end has gone.
_PEER_GONE = re.compile(
    r"[Cc]onnection (reset|closed|refused|aborted|timed out)|Broken pipe|No route to host|"
    r"Network is (unreachable|down)|Host is down|remote process exited|communicator was aborted|"
    r"[Tt]imed out (waiting|connecting)|Socket Timeout|caused pair closure|wait timeout after"
)
_NETWORK_ERRORS = ("DistBackendError", "DistNetworkError")
"""Classes of torch.distributed, by name: importing it takes longer than most errors do."""
# What NCCL reports of this process and its host alone.
_OWN_FAULT = re.compile(
    r"Duplicate GPU|invalid (usage|argument)|unhandled cuda error|out of memory|"
    r"Cannot allocate memory|No space left|shared memory segment|internal error - please report"
)


def is_peer_gone(error: BaseException) -> bool:
    """Tell whether an error is that of collectives when another process is gone."""
    text = str(error)
    network = any(kind.__name__ in _NETWORK_ERRORS for kind in type(error).__mro__)
    return bool(network or _PEER_GONE.search(text)) and not _OWN_FAULT.search(text)


LOST_PEER = 69
"""Status of a process that ends because another can no longer be relied on: EX_UNAVAILABLE."""


class PeerLost(Exception):
    """Another process is gone, hangs or is in another state; the message names it, if known.

    Commands print the message on every rank, without a traceback, and exit with :data:`LOST_PEER`.
    """


STOPPED_EARLY = 75
"""Status of a run that stopped early and can go on: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Status of a command that Ctrl-C has ended, as shells have it: nobody is to start it again."""


class StoppedEarly(Exception):
    """A run that was asked to stop has saved its state; the message has the reason and place.

    Attributes:
        status: to exit with.
    """

    def __init__(self, text: str, status: int = STOPPED_EARLY) -> None:
        super().__init__(text)
        self.status = status


class ReaderLost(UserError):
    """A reader process was killed, by no mistake of the user's."""

    status = LOST_PEER


class RankError(UserError):
    """Error of a user on one rank only, such as an image that only it reads."""

    def __init__(self, error: UserError, rank: int) -> None:
        super().__init__(f"rank {rank} on {socket.gethostname()}: {error}")
        self.status = error.status


def first_line(error: BaseException) -> str:
    """Return an error's first line; its class where it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REFUSED = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)
"""What the system answers where a path is the mistake, wherever it is met."""
_NO_MEMORY = re.compile(r"(allocate|enough) memory|out of memory")  # torch, on CPUs and GPUs


def limit_met(error: Exception) -> str | None:
    """Name the limit of this machine that an error is about; None: another error."""
    if isinstance(error, OSError):
        return _limit_of_files(error)
    if str(error) == "can't start new thread":
        return processes_advice("thread")
    network = any(kind.__name__ in _NETWORK_ERRORS for kind in type(error).__mro__)
    if isinstance(error, MemoryError) or (_NO_MEMORY.search(str(error)) and not network):
        return (
            f"not enough memory ({first_line(error)[:300] or 'for Python'}): a lower --batch-size, "
            "--image-size, --nce-k or --num-workers, --activation-checkpointing or more GPUs take "
            "less; `python -m moco_scale plan` says what fits"
        )
    return None


def _limit_of_files(error: OSError) -> str | None:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return open_failure(error)
    if "No usable temporary directory" in str(error):  # `tempfile`, after a write to each
        return (
            f"there is no folder for temporary files ({error.strerror}): make room, or set TMPDIR "
            "to a folder that can be written"
        )
    if error.errno in _FULL:
        where = f"{printable(error.filename)}: " if error.filename else ""
        return f"cannot write {where}{error.strerror}: make room, or name another place"
    if error.errno in _REFUSED and isinstance(error.filename, (str, bytes)):
        return f"{printable(error.filename)}: {error.strerror}"
    return None


def processes_advice(what: str) -> str:
    """Advise what to do where no more "process" or "thread" can be started."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return (
        f"cannot start another {what}: this user may have {limit} processes and threads "
        "(`ulimit -u`), and a container may have a limit of its own (pids); end some, lower "
        "--num-workers, or raise it"
    )


def open_failure(error: OSError) -> str:
    """Explain why a file could not be opened or mapped; advise on too many open files."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}. {open_files_advice()}"
    return reason


def open_files_advice() -> str:
    """Advise on the limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = (
        f"raise it with `ulimit -n {hard}` in the shell or script that starts this"
        if soft < hard
        else "the administrator can raise it (LimitNOFILE, /etc/security/limits.conf)"
    )
    return f"This process may have {soft} files open (`ulimit -n`); {more}"
