"""Making shards in tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset  # noqa: F401  (so that processes forked here have it)

from moco_scale.__main__ import main


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
