"""Saved scans of remote tars, so that none is fetched twice to be indexed.

``HASH.npz``, HASH being that of the tar's address, holds the scan, the tar's size and checksum, and
the store's state of it when it was fetched.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_scale.data.remote.shard_cache import write_once
from moco_scale.data.remote.store import FileState
from moco_scale.data.shards.tar_scan import ShardScan
from moco_scale.untrusted.documents import parse_document
from moco_scale.untrusted.saved_scan import FORMAT, SavedScanText
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_COLUMNS: dict[str, np.dtype[Any]] = {
    "offset": np.dtype("<u8"),
    "size": np.dtype("<u4"),
    "label": np.dtype("<i8"),
}
_NPY_HEADER = 128  # bytes of it, of one dimension
_WORDS = ("odd", "dotted", "part")


class SavedScan(NamedTuple):
    """Scan of a tar that was fetched once."""

    scan: ShardScan
    bytes: int
    checksum: str
    """Hex BLAKE2b-128 of its bytes."""
    state: FileState

    @property
    def version(self) -> str:
        return version_of(self.state)


def version_of(state: FileState) -> str:
    """Return a short name of the current version at an address."""
    return hashlib.blake2b(json.dumps(state).encode(), digest_size=6).hexdigest()


def load_scan(path: Path) -> SavedScan | None:
    """Load a scan; None: it was not saved, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return None  # np.savez compresses nothing, so none is larger than the file
            text = _column(archive, "said", np.dtype("u1"))
            said = parse_document(text.tobytes(), SavedScanText, str(path))
            offset, size, label = (_column(archive, *column) for column in _COLUMNS.items())
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, UserError):
        return None
    if not len(offset) == len(size) == len(label) or not _labels_fit(label, said.names):
        return None
    words = said.names, said.without_image, said.odd, said.dotted, said.part
    state = FileState(*said.state)
    return SavedScan(ShardScan(offset, size, label, *words), said.bytes, said.checksum, state)


def _column(archive: zipfile.ZipFile, name: str, kind: np.dtype[Any]) -> np.ndarray:
    """Read a one-dimensional array in the format of np.savez, and nothing else.

    Raises:
        ValueError: It is another array, or none.
    """
    content, header = archive.read(f"{name}.npy"), io.BytesIO()
    shape = ((len(content) - _NPY_HEADER) // kind.itemsize,)
    said = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, said)
    if content[:_NPY_HEADER] != header.getvalue():
        raise ValueError
    return np.frombuffer(content, kind, offset=_NPY_HEADER)


def _labels_fit(label: np.ndarray, names: list[str]) -> bool:
    highest = len(names) if names else 2**31
    return len(label) == 0 or (label.min() >= -1 and label.max() < highest)


def save_scan(path: Path, saved: SavedScan) -> None:
    """Save a scan, replacing that of an earlier tar. Raises OSError."""
    said = {
        "format": FORMAT,
        "bytes": saved.bytes,
        "checksum": saved.checksum,
        "state": saved.state,
        "names": saved.scan.names,
        "without_image": saved.scan.without_image,
        **{field: printable(getattr(saved.scan, field)) for field in _WORDS},
    }
    content, scan = io.BytesIO(), saved.scan
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    np.savez(content, offset=scan.offset, size=scan.size, label=scan.label, said=text)
    write_once(path, content.getvalue())


def scan_path(folder: Path, address: str) -> Path:
    """Return the path of the saved scan of the tar at an address."""
    return folder / f"{hashlib.blake2b(address.encode(), digest_size=12).hexdigest()}.npz"
