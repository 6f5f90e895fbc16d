"""What is shipped: nothing that runs is left out, and what says a version says the same."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import moco_scale


@pytest.fixture(scope="module")
def tracked(repository: Path) -> list[str]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("this is no checkout")
    return done.stdout.splitlines()


def test_a_wheel_has_every_file_of_the_package(repository: Path, tracked: list[str]) -> None:
    tools = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]
    listed = tools["setuptools"]["package-data"]
    patterns = [
        f"{package.replace('.', '/')}/{pattern}".removeprefix("moco_scale/")
        for package, each in listed.items()
        for pattern in each
    ]
    files = [name.removeprefix("moco_scale/") for name in tracked if name.startswith("moco_scale/")]
    data = [name for name in files if not name.endswith(".py")]
    assert "py.typed" in data and "ds_configs/zero1.json" in data
    assert [name for name in data if not any(fnmatch.fnmatch(name, p) for p in patterns)] == []
    packages = {str(Path(name).parent) for name in files if name.endswith(".py")}
    assert all(f"{name}/__init__.py" in files for name in packages - {"."}), "found by it alone"


def test_an_sdist_has_every_file_of_the_checkout(repository: Path, tracked: list[str]) -> None:
    lines = [line.split() for line in (repository / "MANIFEST.in").read_text().splitlines()]
    folders = {line[1] for line in lines if line[0] == "graft"} | {"moco_scale"}
    patterns = [p for line in lines if line[0] == "include" for p in line[1:]]
    patterns += ["pyproject.toml", "LICENSE", "MANIFEST.in"]  # which always are
    left = [
        name
        for name in tracked
        if name.partition("/")[0] not in folders
        if "/" in name or not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    assert left == [], "name them in MANIFEST.in"


def test_ds_configs_at_the_top_are_those_of_the_package(repository: Path) -> None:
    packaged = Path(moco_scale.__file__).parent / "ds_configs"
    names = [f"zero{stage}.json" for stage in range(4)]
    assert sorted(path.name for path in packaged.iterdir()) == names
    for name in names:
        assert (repository / "ds_configs" / name).read_bytes() == (packaged / name).read_bytes()


def test_every_file_that_says_the_version_says_the_same(repository: Path) -> None:
    version = moco_scale.__version__
    assert yaml.safe_load((repository / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## (\S+)", (repository / "CHANGELOG.md").read_text(), re.M)
    assert next(heading for heading in headings if heading != "Unreleased") == version


def test_hooks_and_workflow_run_what_is_here(repository: Path) -> None:
    workflow = yaml.safe_load((repository / ".github" / "workflows" / "ci.yml").read_text())
    last = workflow["jobs"]["checks"]["steps"][-1]["run"]
    assert last.split()[-1] == ".ci/run" and (repository / ".ci" / "run").exists()
    hooks = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"][0]
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format", "codespell"]


def test_an_image_copies_what_is_there(repository: Path) -> None:
    lines = (repository / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    shown = (repository / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (repository / name).exists() and f"!{name}" in shown
    first = next(line for line in lines if line.startswith(("ARG", "FROM", "RUN")))
    assert first.startswith("ARG BASE=pytorch/pytorch:"), "any other can be chosen"
