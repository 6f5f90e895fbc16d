"""The demo in plain torch: the package's step between its draws gives its losses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """48 training and 8 validation images of 2 classes, 32 pixels a side."""
    for split, count in (("train", 24), ("val", 4)):
        for c, name in enumerate(("ash", "birch")):
            for i in range(count):
                path = tmp_path / split / name / f"{i:02d}.png"
                write_image(path, seed=100 * c + i, width=32, height=32)
    return tmp_path


def run(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = str(repository / "scripts" / "plain_demo.py")
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def result(repository: Path, *arguments: object) -> dict[str, Any]:
    done = run(repository, *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_steps_agree(repository: Path, images: Path) -> None:
    common = (images, "--precision", "fp32", "--batch-size", 16, "--bn-splits", 4)
    plain = result(repository, *common, "--epochs", 1, "--step", "plain", "--knn")
    package = result(repository, *common, "--epochs", 1, "--step", "package", "--knn")
    assert package["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert package["knn"][0] == plain["knn"][0] and len(package["knn"]) == 2
    other = result(repository, *common, "--epochs", 1, "--step", "plain", "--seed", 1)
    assert other["losses"] != pytest.approx(plain["losses"], rel=1e-3)


def test_a_wrong_folder_is_named(repository: Path, images: Path) -> None:
    done = run(repository, images / "train")
    assert done.returncode == 2
    assert f"{images}/train has no folder train/ of CLASS/*" in done.stderr
