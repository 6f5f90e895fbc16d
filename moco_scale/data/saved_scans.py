"""What tars elsewhere were found to hold, kept for each: none is fetched twice to be indexed.

``HASH.npz``, HASH being that of the tar's address, holds the scan, the tar's size and checksum, and
what the place said of it when it was fetched.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_scale.data.remote import FileState
from moco_scale.data.shard_cache import write_once
from moco_scale.data.tar_scan import ShardScan

_FORMAT = 3
_SAID = ShardScan._fields[3:]  # what is no array


class SavedScan(NamedTuple):
    """A tar that was fetched once."""

    scan: ShardScan
    bytes: int
    checksum: str
    """Hex BLAKE2b-128 of its bytes."""
    state: FileState

    @property
    def version(self) -> str:
        return version_of(self.state)


def version_of(state: FileState) -> str:
    """A short name for what lies at an address now."""
    return hashlib.blake2b(json.dumps(state).encode(), digest_size=6).hexdigest()


def load_scan(path: Path) -> SavedScan | None:
    """None: it was not saved, or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as found:
            said = json.loads(bytes(found["said"]))
            if said["format"] != _FORMAT:
                return None
            columns = found["offset"], found["size"], found["label"]
        scan = ShardScan(*columns, *(said[field] for field in _SAID))
        return SavedScan(scan, said["bytes"], said["checksum"], FileState(*said["state"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def save_scan(path: Path, saved: SavedScan) -> None:
    """In the place of what is known of an earlier tar there. Raises OSError."""
    said = {
        "format": _FORMAT,
        "bytes": saved.bytes,
        "checksum": saved.checksum,
        "state": saved.state,
        **{field: getattr(saved.scan, field) for field in _SAID},
    }
    content, scan = io.BytesIO(), saved.scan
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    np.savez(content, offset=scan.offset, size=scan.size, label=scan.label, said=text)
    write_once(path, content.getvalue())


def scan_path(folder: Path, address: str) -> Path:
    """Where what is known of the tar at an address is kept."""
    return folder / f"{hashlib.blake2b(address.encode(), digest_size=12).hexdigest()}.npz"
