"""The wheel, installed by itself: its command runs in an empty folder, far from any checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import LIMIT


def done(*command: object, **keywords: object) -> str:
    run = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        **keywords,  # type: ignore[call-overload]
    )
    assert run.returncode == 0, run.stdout
    return str(run.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_runs_from_a_wheel_in_an_empty_folder(repository: Path, tmp_path: Path) -> None:
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "moco_scale", source / "moco_scale", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet")
    done(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    done(*pip, "install", "--no-deps", "--no-index", "--target", site, *tmp_path.glob("*.whl"))
    empty.mkdir()
    there = {"cwd": empty, "env": os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}}
    where = (sys.executable, "-c", "import moco_scale; print(moco_scale.__file__)")
    assert done(*where, **there).startswith(str(site))
    few = ("--train-per-class", 13, "--val-per-class", 4, "--epochs", 1)
    printed = done(site / "bin" / "moco-scale", "demo", *few, **there)
    assert "--module moco_scale train --deepspeed zero1" in printed
    assert "linear classifier" in printed and (empty / "runs/demo/summary.json").exists()
    assert [path.name for path in empty.iterdir()] == ["runs"]
