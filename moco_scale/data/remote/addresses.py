"""Addresses in a data set's name, and their display, as text only."""

from __future__ import annotations

import re

from moco_scale.utils.errors import UserError

_PIPE = "pipe:"  # commands: WebDataset has them
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_USER = re.compile(r"//[^/\s]*@")  # up to the last @: a password may have one
_SIGNATURE = re.compile(r"(://(?:\{[^{}]*\}|[^?#,])*?)/*[?#][^,]*")
_SIGNATURE_IN_TEXT = re.compile(r"(://[^?#,\s'\"]*?)/*[?#][^,\s'\"]*")
_HOST_IN_BRACKETS = re.compile(r"//([^/]*@)?\[[0-9a-fA-F:.%]*\]")


def is_remote(spec: str) -> bool:
    """Tell whether a data set's name is an address."""
    return spec.startswith(_PIPE) or SCHEME.match(spec) is not None


def check_address(spec: str) -> None:
    """Raise UserError for an address that is written as if it could be listed or joined."""
    if SCHEME.search(spec) is None:
        return
    if "::" in _HOST_IN_BRACKETS.sub("//", spec):
        raise UserError(
            f"--data-dir {shown(spec)}: sets that lie elsewhere are not joined by ::; name them as "
            "a mixture, with a comma between them, or all tars by one pattern with braces"
        )
    _, _, below = spec.partition("://")[2].partition("/")
    path, _, query = below.partition("?")
    signs = [sign for sign in "*[" if sign in path]
    if query.lower().endswith(".tar"):
        signs.append("?")
    if signs:
        raise UserError(
            f"--data-dir {shown(spec)}: what lies at an address is not listed, so {signs[0]} "
            "stands for nothing there; name tars by braces, as in train-{000000..000099}.tar"
        )


def refuse_command(spec: str) -> None:
    """Raise UserError for ``pipe:COMMAND``, with the address to give instead."""
    if not spec.startswith(_PIPE):
        return
    instead = _address_in(spec.removeprefix(_PIPE))
    raise UserError(
        f"--data-dir {shown(spec)}: no commands are run to read shards. Name what the command "
        + (
            f"reads: --data-dir {shown(instead)}"
            if instead
            else "reads as https://, s3:// or gs://"
        )
        + ", or any other address that fsspec has a library for (sftp://, hdfs://, …)"
    )


def _address_in(command: str) -> str:
    """Return the folder that a usual command fetches from; "": unknown."""
    words = [word.strip("'\"") for word in command.split()]
    found = next((word for word in words if SCHEME.match(word)), "")
    if not found:
        path = next((word for word in words if "/" in word and "{}" in word), "")
        if words[:1] == ["ssh"]:
            host = next((word for word in words[1:] if not word.startswith("-")), "")
            found = f"sftp://{host}{path}" if host and path.startswith("/") else ""
        elif words[:1] in (["hdfs"], ["hadoop"]):
            found = f"hdfs://{path}" if path.startswith("/") else ""
        elif words[:1] == ["cat"]:
            found = path
    return found.partition("{}")[0].rstrip("/") if found else ""


def shown(spec: str) -> str:
    """Show a data set's name in messages and logs: without passwords and signatures."""
    if spec.startswith(_PIPE):
        return _PIPE + "…"  # a command may hold secrets in any form
    return _SIGNATURE.sub(r"\1", _USER.sub("//", spec))


def holds_secret(spec: str) -> bool:
    """Tell whether a data set's name has a password or signature."""
    return shown(spec).rstrip("/") != spec.rstrip("/") and SCHEME.search(spec) is not None


def scrubbed(text: str) -> str:
    """Remove passwords and signatures from text that may have addresses in it."""
    return _SIGNATURE_IN_TEXT.sub(r"\1", _USER.sub("//", text))
