"""Passwords and signatures for web servers, from places that nobody prints.

In order of precedence: the address itself; the variables below; the host's line of netrc. They are
for the servers that the user has named, and go to no other.
"""

from __future__ import annotations

import base64
import netrc
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from moco_scale.data.remote.addresses import holds_secret, shown
from moco_scale.distributed.launchers import rank_of
from moco_scale.untrusted.limits import NETRC
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log
from moco_scale.utils.text import printable

USER = "MOCO_SCALE_HTTP_USER"
PASSWORD = "MOCO_SCALE_HTTP_PASSWORD"
TOKEN = "MOCO_SCALE_HTTP_TOKEN"
"""Sent as ``Authorization: Bearer …``."""
SIGNATURE = "MOCO_SCALE_HTTP_SIGNATURE"
"""Query (after the ?) of every address without one of its own."""


def authorization(
    address: urllib.parse.SplitResult, environ: Mapping[str, str] = os.environ
) -> str | None:
    """Return the Authorization header for a server; None: there is none.

    Raises:
        UserError: Variables contradict each other, or netrc cannot be read.
    """
    header: str | None = None
    if address.username is not None:
        user, password = address.username, address.password or ""
        header = _basic(urllib.parse.unquote(user), urllib.parse.unquote(password))
    elif environ.get(TOKEN):
        if environ.get(PASSWORD):
            raise UserError(f"{TOKEN} and {PASSWORD} are both set; unset the one that is not meant")
        header = f"Bearer {environ[TOKEN].strip()}"
    elif environ.get(PASSWORD) or environ.get(USER):
        header = _basic(environ.get(USER, ""), environ.get(PASSWORD, ""))
    else:
        found = _of_netrc(address.hostname or "", environ)
        header = _basic(*found) if found else None
    if header is not None and not header.isprintable():
        raise UserError(f"the credentials for {address.hostname} hold a line feed or the like")
    return header


def signature(address: urllib.parse.SplitResult, environ: Mapping[str, str] = os.environ) -> str:
    """Return the query (after the ?) of an address; "": none."""
    return address.query or environ.get(SIGNATURE, "").strip().removeprefix("?")


def warn_of_printed(spec: str, environ: Mapping[str, str] = os.environ) -> None:
    """Warn, on rank 0, where the launcher has printed a password or signature."""
    # Only deepspeed sets it, and only deepspeed prints its command line.
    if "CROSS_RANK" not in environ or rank_of(environ) != 0 or not holds_secret(spec):
        return
    log.warning(
        f"--data-dir {shown(spec)}: deepspeed prints its command line, so the password or "
        f"signature in it is in the job's log. Give it in ~/.netrc or {PASSWORD}, a signature in "
        f"{SIGNATURE} (docs/data.md), or start with torchrun"
    )


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _of_netrc(host: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    named = environ.get("NETRC")
    try:
        path = Path(named).expanduser() if named else Path("~/.netrc").expanduser()
        if not named and not path.is_file():
            return None
        if path.stat().st_size > NETRC:
            raise UserError(f"{path} has more than {NETRC:,} bytes, which no netrc has")
        found = netrc.netrc(str(path)).authenticators(host)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if not named:  # nobody has asked for it
            return None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"NETRC={printable(named)} cannot be read: {reason}") from None
    except (netrc.NetrcParseError, ValueError) as error:
        raise UserError(f"{path} is no netrc: {_without_words(error)}") from None
    return (found[0] or "", found[2] or "") if found else None


def _without_words(error: Exception) -> str:
    """Describe an error of netrc without its words: one may be a password."""
    line = getattr(error, "lineno", None)
    return f"line {line} cannot be understood" if line else "it cannot be understood"
