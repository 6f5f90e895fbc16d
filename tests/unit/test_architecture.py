"""The architecture as tests: who may import whom, how long a file may be, what may draw."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moco_scale"
LOWEST_FIRST = (
    *("utils", "untrusted", "distributed", "observe"),
    *("data/sampling", "data/images", "data/remote", "data/shards", "data/loading"),
    *("data", "data/tools", "models", "optim", "methods", "config", "engines", "checkpoints"),
    *("evaluation", "planner", "training", "demo", "commands"),
)
"""Rooms; each imports only rooms before it."""
LINES = 450
DRAWS = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "dropout"),
    *("rand_like", "randn_like", "randint_like", "random_", "uniform_", "normal_", "bernoulli_"),
    *("random", "choice", "choices", "shuffle", "sample", "uniform", "permutation"),
}
"""Names of functions that draw, of torch, numpy and Python; the global generator by default."""
GENERATORS = ("torch", "random", "np.random", "numpy.random", "F")
"""What they are called on when it is."""


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax tree of each module of the package, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def room(module: str) -> str:
    """Room of a module, "" at the root of the package."""
    parts = module.split(".")[1:]
    if parts[:1] == ["data"] and "/".join(parts[:2]) in LOWEST_FIRST:
        return "/".join(parts[:2])
    return parts[0] if parts and parts[0] in LOWEST_FIRST else ""


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, also within functions and for type checking only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in modules() else base


def test_the_root_of_the_package_holds_rooms_only() -> None:
    names = {path.name for path in PACKAGE.glob("*.py")}
    assert names == {"__init__.py", "__main__.py"}, "a module belongs into a room"


def test_rooms_import_downwards() -> None:
    upward = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imports(tree)
        if (mine := room(name)) and (theirs := room(other)) and mine != theirs
        if LOWEST_FIRST.index(theirs) > LOWEST_FIRST.index(mine)
    ]
    assert not upward, "move what is shared into the lower room, or hand it in as an argument"


def test_no_import_circle() -> None:
    graph = {
        name: {other for other in imports(tree) if other in modules() and other != name}
        for name, tree in modules().items()
    }
    while leaves := [name for name, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        for others in graph.values():
            others.difference_update(leaves)
    assert not graph, "these modules import each other, or one that is in a circle"


def test_only_distributed_sends_messages() -> None:
    wrong = [
        name
        for name, tree in modules().items()
        if room(name) not in ("distributed", "engines")
        for other in imports(tree)
        # Reads and writes files; its ranks meet through distributed/.
        if other.startswith("torch.distributed")
        and not other.startswith("torch.distributed.checkpoint")
    ]
    assert not wrong, "call distributed.collectives"


def test_only_engines_know_deepspeed() -> None:
    wrong = [
        name
        for name, tree in modules().items()
        if room(name) != "engines"
        if any(other.split(".")[0] == "deepspeed" for other in imports(tree))
    ]
    assert not wrong, "ask the engine instead"


def test_nothing_imports_commands() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        if room(name) not in ("commands", "")
        for other in imports(tree)
        if room(other) == "commands"
    ]
    assert not wrong, "what a command and another share belongs into a room below commands"


def test_methods_and_models_know_no_engine_and_no_loop() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        if room(name) in ("methods", "models")
        for other in imports(tree)
        if room(other) in ("engines", "training")
    ]
    assert not wrong, "an engine wraps a method, and the loop calls it: never the other way"


def test_no_file_is_longer_than_a_room() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    paths = [ROOT / name for name in listed.stdout.split()] or sorted(PACKAGE.rglob("*.py"))
    long = {
        str(path.relative_to(ROOT)): count
        for path in paths
        if path.exists() and (count := len(path.read_text().splitlines())) > LINES
    }
    assert not long, "each is two files with one purpose each"


def test_nothing_draws_from_a_global_generator() -> None:
    """First weights are drawn by ``nn.init``, in a fork of the generator: see build_encoder."""
    drawing = [
        f"{name}:{node.lineno}: {ast.unparse(node.func)}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in DRAWS
        and (ast.unparse(node.func.value) in GENERATORS or node.func.attr.endswith("_"))
        and ast.unparse(node.func.value) != "nn.init"
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]
    assert not drawing, "draw by name from data/sampling/random.py, or from a seeded generator"
