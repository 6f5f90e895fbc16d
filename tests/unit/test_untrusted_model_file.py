"""A model file from outside, and small files that ask for much memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_errors import error_of

from moco_scale.__main__ import main


class TestModelFile:
    def inspected(self, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert main(["inspect", str(path)]) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err and shown.err.count("error:") == 1
        return shown.err

    @pytest.mark.parametrize(
        "odd",
        [
            {"epoch": "abc"},
            {"epoch": float("inf")},
            {"step": [1]},
            {"step": -1},
            {"opt": {"dim": 10**30}},
            {"opt": {"dim": "8"}},
            {"opt": {"dim": torch.ones(3)}},
            {"opt": {3: 1}},
            {"opt": 3},
        ],
    )
    def test_odd_values(
        self, odd: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "current.pth"
        torch.save({"opt": {"dim": 8}, "model": {"a": torch.ones(2)}} | odd, path)
        assert next(iter(odd)) in self.inspected(path, capsys)

    def test_text_is_made_fit_to_be_shown(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "current.pth"
        name = "a\x1b[2J\nforged"
        torch.save(
            {"opt": {"data_dir": "x\x1b]0;y\x07\udce9"}, "model": {name: torch.ones(2)}}, path
        )
        assert main(["inspect", str(path), "--tensors"]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "\\x1b]0;y\\x07\\xe9" in shown and "\\nforged" in shown

    def test_settings_of_an_encoder(self, tmp_path: Path) -> None:
        from moco_scale.evaluation.pretrained import load_pretrained

        opt = {
            **{"model": "vit_small", "model_width": 1, "stem": "imagenet", "head": "linear"},
            **{"dim": 8, "image_size": 32, "patch_size": 16, "dataset": "images"},
        }
        path = tmp_path / "current.pth"
        for odd, expected in (
            ({"model": "resnet51"}, "model: resnet51 is none of"),
            ({"model": ["resnet50"]}, "model"),
            ({"model_width": 3}, "model_width: 3 is none of 1, 2, 4"),
            ({"model_width": 2}, "--model-width 2: for vit_small"),
            ({"stem": ""}, "stem:  is none of"),
            ({"dim": 0}, "dim: Input should be greater than 0"),
            ({"dim": 1.5e6}, "dim '1500000.0' is no value of it"),
            ({"image_size": 1 << 40}, "image_size: Input should be less than"),
            ({"image_size": 33}, "not a multiple"),
            ({"patch_size": -1}, "patch_size"),
            ({"dataset": 3}, "dataset"),
            ({}, "do not fit the vit_small"),
        ):
            torch.save({"opt": opt | odd, "model": {"a": torch.ones(2)}}, path)
            message = error_of(lambda: load_pretrained(path))
            assert message.startswith(str(path)) and expected in message, odd


BOMBS = r"""
import io, json, pickle, resource, struct, sys, zipfile
from pathlib import Path
import torch
from moco_scale.checkpoints import checkpoint
from moco_scale.utils.errors import UserError
from moco_scale.evaluation.pretrained import load_pretrained
sys.path[:0] = [sys.argv[2]]
import model_file_target
import test_untrusted_pickles as pickles

folder = Path(sys.argv[1])
tried = 0
def refused(action):
    global tried
    tried += 1
    try:
        action()
    except UserError as error:
        assert len(str(error)) < 2000
        return
    raise AssertionError("not refused")

def index(content):
    (folder / ".metadata").write_bytes(b"\x80\x04" + content + b".")
    refused(lambda: checkpoint.shapes(folder))

def model(content):
    (folder / "current.pth").write_bytes(content)
    refused(lambda: load_pretrained(folder / "current.pth"))

checkpoint.save(folder / "c", {"x": torch.ones(6)}, {"step": 1})
small = (folder / "c" / ".metadata").read_bytes()
(data,) = (folder / "c").glob("*.distcp")
load_pretrained  # everything is imported by now
with torch.device("meta"):
    pickles.build = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index(b"Nr" + struct.pack("<I", 200_000_000))
index(b"Nr" + struct.pack("<I", (1 << 32) - 1))
index(b"X" + struct.pack("<I", (1 << 32) - 1) + b"a")
index(b"\x8d" + struct.pack("<Q", 1 << 40) + b"a")
index(b"\x95" + struct.pack("<Q", 1 << 40))
index(b"\x8b" + struct.pack("<I", (1 << 31) - 1))
index(b"}" * 10_000_000)
index(b")\x94" + b"".join(b"h" + bytes([n]) + b"\x86\x94" for n in range(100)))
for name in (".metadata", "meta.json"):
    with open(folder / name, "wb") as file:
        file.truncate(3 << 30)
refused(lambda: checkpoint.shapes(folder))
refused(lambda: checkpoint.read_meta(folder))
(folder / "meta.json").write_bytes(
    b'{"format": 1, "step": 4, "files": {' + b",".join(b'"%d/": []' % n for n in range(1_000_000))
    + b'}, "crc32": {}}'
)
refused(lambda: checkpoint.read_meta(folder))
# A tensor with stride 0, in the file that the index promises six numbers of.
evil = pickles.zipped([
    ("a/data.pkl", pickles.tensor_pickle((750_000_000,), (0,), count=1)), ("a/data/0", bytes(4))
])
metadata = pickle.loads(small)
for place in metadata.storage_data.values():
    place.offset, place.length = 0, len(evil)
data.write_bytes(evil)
(folder / "c" / ".metadata").write_bytes(pickle.dumps(metadata))
refused(lambda: checkpoint.load(folder / "c"))
for entry in metadata.state_dict_metadata.values():
    entry.size = torch.Size((750_000_000,))
    entry.chunks[0].sizes = entry.size
(folder / "c" / ".metadata").write_bytes(pickle.dumps(metadata))
refused(lambda: checkpoint.load(folder / "c"))
# Model files: compressed, of a size that the settings alone ask for, of one number.
stream = io.BytesIO()
with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    with archive.open("a/data/0", "w") as record:
        for _ in range(64):
            record.write(bytes(1 << 24))
    archive.writestr("a/data.pkl", pickles.tensor_pickle((1 << 28,), (1,), count=1 << 28))
model(stream.getvalue())
opt = {"model": "resnet18", "model_width": 1, "stem": "cifar", "head": "linear", "image_size": 32}
for dim in (1_500_000, 5_000_000, (1 << 31) - 1):
    stream = io.BytesIO()
    torch.save({"opt": opt | {"dim": dim}, "model": {"head.bias": torch.ones(2)}}, stream)
    model(stream.getvalue())
vit = {"model": "vit_huge", "image_size": 4096, "patch_size": 1, "dim": 8, "model_width": 1}
stream = io.BytesIO()
torch.save({"opt": opt | vit, "model": {"head.bias": torch.ones(2)}}, stream)
model(stream.getvalue())
model(pickles.in_zip(b"\x80\x02Nr" + struct.pack("<I", 200_000_000) + b"."))
with open(folder / "current.pth", "wb") as file:
    file.truncate(3 << 30)
    file.seek(3 << 30)
    # Its list of records is 2 GB long.
    file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2 << 30, 1 << 30, 0))
refused(lambda: load_pretrained(folder / "current.pth"))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(tried, grown // 1024)
"""


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path), str(here)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr
    tried, grown = map(int, result.stdout.split())
    assert tried == 20 and grown < 500, result.stdout
