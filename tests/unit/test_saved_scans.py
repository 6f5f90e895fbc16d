"""What is kept of tars elsewhere, whatever has become of the file."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moco_scale.data.remote.store import FileState
from moco_scale.data.shards.saved_scans import SavedScan, load_scan, save_scan
from moco_scale.data.shards.tar_scan import ShardScan
from moco_scale.untrusted.saved_scan import FORMAT

COLUMNS = {
    "offset": np.array([512, 2048], "<u8"),
    "size": np.array([10, 20], "<u4"),
    "label": np.array([0, -1], "<i8"),
}


def _array(header: str, content: bytes = bytes(16)) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + content


def _offsets(shape: str, kind: str = "<u8") -> bytes:
    return _array(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    scan = ShardScan(COLUMNS["offset"], COLUMNS["size"], COLUMNS["label"], ["ash"], 3, "", "", "")
    state = FileState(4096, "tag", "")
    save_scan(tmp_path / "a.npz", SavedScan(scan, 4096, "0" * 32, state))
    found = load_scan(tmp_path / "a.npz")
    assert found is not None
    assert (found.bytes, found.state, found.scan.names) == (
        4096,
        FileState(4096, "tag", ""),
        ["ash"],
    )
    for name, column in COLUMNS.items():
        assert np.array_equal(getattr(found.scan, name), column)


@pytest.mark.parametrize(
    "offset",
    [
        *(_offsets("(1000000000000000,)"), _offsets("(99999999999999999999999999,)")),
        *(_offsets("()"), _offsets("(True,)"), _offsets("(2, 1)"), _offsets("(3,)")),
        *(_offsets("(2,)", "<i8"), _offsets("(1,)", "|O"), _array("(" * 100), b"nothing", b""),
    ],
)
def test_a_damaged_one_is_none(tmp_path: Path, offset: bytes) -> None:
    said = {
        "format": FORMAT,
        "bytes": 9,
        "checksum": "0" * 32,
        "state": [9, "", ""],
        "names": ["ash"],
    }
    said |= {"without_image": 0, "odd": "", "dotted": "", "part": ""}
    arrays = COLUMNS | {"said": np.frombuffer(json.dumps(said).encode(), np.uint8)}
    path = tmp_path / "a.npz"
    for content in (None, offset):
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                np.save(file := io.BytesIO(), array)
                whole = content is None or name != "offset"
                archive.writestr(f"{name}.npy", file.getvalue() if whole else content or b"")
        assert (load_scan(path) is None) == (content is not None)
