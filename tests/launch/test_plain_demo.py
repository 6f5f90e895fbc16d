"""The demo in plain torch: the package's step between its draws gives its losses."""

import ast
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import write_image

EXAMPLE, DEMO = "examples/moco_in_one_file.py", "scripts/plain_demo.py"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """48 training and 8 validation images of 2 classes, 32 pixels a side."""
    for split, count in (("train", 24), ("val", 4)):
        for c, name in enumerate(("ash", "birch")):
            for i in range(count):
                path = tmp_path / "images" / split / name / f"{i:02d}.png"
                write_image(path, seed=100 * c + i, width=32, height=32)
    return tmp_path / "images"


def run(repository: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def result(repository: Path, script: str, *arguments: object) -> dict[str, Any]:
    done = run(repository, script, *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_steps_agree(repository: Path, images: Path, tmp_path: Path) -> None:
    """The example on a tar, and the package's step between its draws on a folder."""
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.add(images, "cifar")
    common = ("--epochs", 1, "--batch-size", 16, "--bn-splits", 4, "--precision", "fp32", "--knn")
    plain = result(
        repository, EXAMPLE, tmp_path / "images.tar.gz", *common, "--head", "linear", "--of", 8
    )
    package = result(repository, DEMO, images, *common, "--step", "package")
    assert package["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert package["knn"][0] == plain["knn"][0] and len(package["knn"]) == 2
    other = result(repository, DEMO, images, *common, "--step", "plain", "--seed", 1)
    assert other["losses"] != pytest.approx(plain["losses"], rel=1e-3)


def test_a_wrong_folder_is_named(repository: Path, images: Path) -> None:
    done = run(repository, DEMO, images / "train")
    assert done.returncode == 2
    assert f"{images}/train has no images train/CLASS/*" in done.stderr


def test_the_example_stands_alone(repository: Path) -> None:
    """Nobody needs the package to run it, and nothing of the package can be in what it shows."""
    tree = ast.parse((repository / EXAMPLE).read_text())
    named = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    named += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in named} - sys.stdlib_module_names
    assert foreign == {"torch", "torchvision", "PIL"}
