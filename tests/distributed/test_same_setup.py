"""Differences between processes are named."""

import importlib.metadata
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from harness import run_ranks

from moco_scale.config import command_line
from moco_scale.distributed import collectives, same_setup
from moco_scale.utils.errors import UserError


def compared(facts_of_ranks: list[dict[str, str]], package_of_last: str = "") -> str:
    """Return the message of require_same on this rank; hosts have two ranks each."""
    rank = collectives.rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"node-{rank // 2}")
        if package_of_last and rank == collectives.world_size() - 1:
            patch.setattr(same_setup, "PACKAGE", Path(package_of_last))
        try:
            same_setup.require_same(facts_of_ranks[rank], "do something")
        except UserError as error:
            return str(error)
    return ""


def compare(*facts_of_ranks: dict[str, str], package_of_last: str = "") -> str:
    """What every one of so many ranks says."""
    said = run_ranks(compared, len(facts_of_ranks), list(facts_of_ranks), package_of_last)
    assert len(set(said)) == 1
    return said[0]


def test_the_odd_one_out_is_named(tmp_path: Path) -> None:
    usual = {"torch": "2.14.1", "--rng-seed": "0"}
    assert compare(usual, usual, dict(reversed(usual.items()))) == ""
    odd = usual | {"--rng-seed": "7", "more": "1"}
    package = shutil.copytree(same_setup.PACKAGE, tmp_path / "package")
    (package / "queue.py").write_text("# edited\n")
    assert compare(usual, usual, usual, odd, package_of_last=str(package)) == (
        "the processes differ:\n"
        "  --rng-seed: 7 on rank 3 (node-1), 0 on ranks 0-2 (node-0, node-1)\n"
        "  more: 1 on rank 3 (node-1), nothing on ranks 0-2 (node-0, node-1)\n"
        "  files of the package that differ: queue.py\n"
        "do something"
    )


def test_one_process_is_like_itself() -> None:
    same_setup.require_same({"anything": "at all"})


def test_the_facts_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("{}")
    config = command_line.parse(["--deepspeed", str(file), "--rng-seed", "5", "--data-dir", "X"])
    facts = same_setup.of_run(config.flat())
    assert (facts["--rng-seed"], facts["--engine"], facts["device"]) == ("5", "deepspeed", "cpu")
    assert facts["deepspeed"] == importlib.metadata.version("deepspeed")
    assert facts["torch"] == importlib.metadata.version("torch")
    assert not {"--data-dir", "--output-dir", "--num-workers", "--deepspeed"} & facts.keys()
    file.write_text("{ }")
    name = "content of the --deepspeed file"
    assert {k for k, v in same_setup.of_run(config.flat()).items() if v != facts[k]} == {name}
    file.unlink()
    plain = same_setup.of_run(command_line.parse(["--rng-seed", "5"]).flat())
    assert "deepspeed" not in plain and name not in plain


def test_edited_code_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = same_setup.code_version()
    assert re.fullmatch(r"moco_scale \d+\.\d+\.\d+, files [0-9a-f]{8}", before)
    monkeypatch.setattr(same_setup, "PACKAGE", shutil.copytree(same_setup.PACKAGE, tmp_path / "p"))
    assert same_setup.code_version() == before
    with (tmp_path / "p" / "data" / "augment.py").open("a") as file:
        file.write("\n")
    assert same_setup.code_version() != before


def test_gpus_bring_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    facts = same_setup.installation(torch.device("cuda"))
    assert facts["NCCL"] == "2.29.3"
    assert facts["CUDA"] == str(torch.version.cuda)


def test_ranks_are_written_shortly() -> None:
    hosts = [f"n{rank // 2}" for rank in range(20)]
    assert same_setup.ranks_on_hosts([3], hosts) == "rank 3 (n1)"
    assert same_setup.ranks_on_hosts([0, 1, 2, 5], hosts) == "ranks 0-2, 5 (n0, n1, n2)"
    assert same_setup.ranks_on_hosts(list(range(20)), hosts) == "ranks 0-19 (n0 and 9 more hosts)"
