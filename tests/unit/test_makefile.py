"""The Makefile: help, what every target depends on, and what it says about a wrong Python."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
TARGETS = (
    *("setup", "demo", "cifar10", "test", "test-hosts", "test-slow"),
    *("lint", "format", "engines", "bench", "clean"),
)


def _make(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=repository,
        # `make test` itself may be what runs this: its own flags are not meant for this one.
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_alone_prints_every_target(repository: Path) -> None:
    done = _make(repository)
    assert done.returncode == 0
    for target in TARGETS:
        assert re.search(rf"^  {target} +\S", done.stdout, re.MULTILINE), target


@pytest.mark.parametrize("target", ["demo", "cifar10", "test", "lint", "bench"])
def test_every_target_sets_up_first(repository: Path, tmp_path: Path, target: str) -> None:
    done = _make(repository, "-n", target, f"VENV={tmp_path}/env")
    assert done.returncode == 0
    install = done.stdout.index("pip install")
    assert "--constraint constraints.txt" in done.stdout
    use = {"lint": "ruff check", "bench": "--quick", "test": "-m pytest"}.get(target, target)
    assert install < done.stdout.rindex(use)


def test_cifar10_hands_its_variables_on(repository: Path) -> None:
    done = _make(repository, "-n", "cifar10", "SOURCE=a b.tar", "EPOCHS=8", "TRAIN_PER_CLASS=1000")
    for words in ("--source 'a b.tar'", "--epochs 8", "--train-per-class 1000"):
        assert words in done.stdout


@pytest.mark.parametrize("target", ["demo", "cifar10"])
def test_the_output_folder_can_be_chosen(repository: Path, target: str) -> None:
    assert f"--output-dir 'runs/{target}'" in _make(repository, "-n", target).stdout
    assert "--output-dir 'a b'" in _make(repository, "-n", target, "OUT=a b").stdout


def test_a_wrong_python_is_named(repository: Path, tmp_path: Path) -> None:
    done = _make(repository, "setup", f"VENV={tmp_path}/env", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "'no-such-python'" in done.stderr and "3.11" in done.stderr
    assert not (tmp_path / "env").exists()


def test_constraints_pin_every_direct_dependency(repository: Path) -> None:
    """Of those that `make setup` installs: the extra for object stores is not among them."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = [re.split("[><=]", requirement)[0] for requirement in listed]
    pinned = set(re.findall(r"^([\w.-]+)==", (repository / "constraints.txt").read_text(), re.M))
    assert {"torch", "deepspeed", "pytest"} <= set(wanted)
    assert set(wanted) <= pinned
