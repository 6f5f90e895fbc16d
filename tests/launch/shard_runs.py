"""Making shards in tests."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import webdataset  # noqa: F401  (so that processes forked here have it)
from PIL import Image

from moco_scale.__main__ import main
from moco_scale.data.shards.indexed_shards import IndexedShards

CLASSES = {"ash": 8, "birch": 8, "cedar": 8}
"""Training images of each class of the fixture image_folder."""


class Command:
    """Runs the shard command into one output folder."""

    def __init__(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = out
        self._capsys = capsys

    def __call__(self, source: Path, *options: str, workers: int = 1) -> int:
        arguments = ["--source", str(source), "--out", str(self.out), "--workers", str(workers)]
        return main(["shard", *arguments, *options])

    def refused(self, source: Path, *options: str, workers: int = 1) -> str:
        """The message of a run that must fail, and leave things as they were."""
        before = self.around()
        assert self(source, *options, workers=workers) == 2
        assert self.around() == before
        shown = self._capsys.readouterr().err
        assert shown.startswith("moco_scale: error: ")
        assert "Traceback" not in shown and "Exception" not in shown
        return shown

    def around(self) -> dict[str, bytes]:
        """All files in the output folder and its siblings, whose names begin alike."""
        return {
            str(path): path.read_bytes() if path.is_file() else b""
            for top in self.out.parent.glob(f"{self.out.name}*")
            for path in [top, *top.rglob("*")]
        }


def told(command: Command, capsys: pytest.CaptureFixture[str], source: Path, *options: str) -> str:
    """What the command says when it makes shards."""
    assert command(source, *options) == 0
    return capsys.readouterr().out


def splits(out: Path) -> dict[str, dict[str, int]]:
    """How many images each class has in each split."""
    found = {}
    for split in json.loads((out / "index.json").read_text())["splits"]:
        shards = IndexedShards.open(out, split)
        labels = shards.labels.tolist()
        found[split] = {name: labels.count(i) for i, name in enumerate(shards.classes)}
        if -1 in labels:
            found[split][""] = labels.count(-1)
    return found


def packed(folder: Path, how: str) -> Path:
    """The folder, or an archive of it beside it."""
    if how == "folder":
        return folder
    archive = folder.with_suffix(f".{how}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if how == "tar":
        with tarfile.open(archive, "w") as tar:
            for path in paths:
                tar.add(path, str(path.relative_to(folder.parent)))
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packing:
            for path in paths:
                packing.write(path, str(path.relative_to(folder.parent)))
    return archive


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((9 + seed, 8), 50).convert("RGB").save(stream, kind)
    return stream.getvalue()
