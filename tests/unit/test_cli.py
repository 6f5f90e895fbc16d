"""What each command is called and how it is asked; who says what is wrong: whoever may know."""

import errno
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest
import torch
from conftest import REPOSITORY

from moco_scale.commands.dispatch import COMMANDS, main
from moco_scale.commands.exit_status import run_command
from moco_scale.config import command_line
from moco_scale.distributed import collectives
from moco_scale.utils.errors import RankError, UserError

PAIR = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
ALONE = f"rank 1 on {socket.gethostname()}: "


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says that ends by a user's error, with a launcher's variables set."""
    # Other tests in this process may have left a group of one.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)

    def told(action: Callable[[], object], **environ: str) -> str:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        monkeypatch.setattr(os, "environ", kept | environ)
        try:
            status = run_command("train.py", lambda: (action(), 0)[1])
        except SystemExit as end:  # a command line that argparse cannot read
            status = end.code  # type: ignore[assignment]
        assert status == 2
        return capsys.readouterr().err

    return told


def test_a_path_that_the_system_refuses_is_a_users_error(told: Callable[..., str]) -> None:
    name = "\x1b" + "x" * 5000
    said = told(lambda: os.stat(name))
    assert said.startswith("train.py: error: \\x1bxxx"), said
    assert said.endswith("…: File name too long\n")
    with pytest.raises(FileNotFoundError):  # which may be a fault of the program's
        told(lambda: os.stat("nowhere"))


def start() -> None:
    collectives.initialize("cpu")


def train(*flags: str) -> Callable[[], object]:
    return lambda: command_line.parse(flags)


@pytest.mark.parametrize(
    ("action", "environ", "expected"),
    [
        (start, {"RANK": "4", "WORLD_SIZE": "4"}, "torchrun: rank 4 of 4 processes"),
        (start, {"RANK": "1", "WORLD_SIZE": "1"}, "torchrun: rank 1 of 1 processes"),
        (
            start,
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "2"},
            "srun: rank 3 of 2 processes",
        ),
        (start, {"RANK": "1", **PAIR, "MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        (start, {"RANK": "1", **PAIR, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        (start, {"RANK": "one", **PAIR}, "RANK='one'"),
        (train("--nce-k", "0"), {"RANK": "1", **PAIR}, "--nce-k 0: must be greater than 0"),
        (train("--recpie", "v2"), {"RANK": "1", **PAIR}, "unrecognized arguments: --recpie v2"),
    ],
)
def test_an_error_of_any_rank_is_said_before_ranks_have_met(
    told: Callable[..., str],
    action: Callable[[], object],
    environ: dict[str, str],
    expected: str,
) -> None:
    said = told(action, **environ)
    assert expected in said
    assert said.startswith("train.py: error: ")
    assert said.count("\n") == 1, said
    rank = environ.get("RANK") or environ["SLURM_PROCID"]
    assert (f"rank {rank} on {socket.gethostname()}: " in said) == rank.isdigit()


def test_a_rank_without_a_gpu_says_so(
    told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = told(lambda: collectives.initialize("cuda"), RANK="1", **PAIR)
    assert said.startswith(f"train.py: error: {ALONE}--device cuda: torch sees no CUDA device")


def test_rank_0_says_how_a_command_line_is_written(told: Callable[..., str]) -> None:
    said = told(train("--recpie"), RANK="0", **PAIR)
    assert "usage: train.py" in said and "train.py: error: unrecognized" in said


def test_ranks_that_have_met_say_it_once(
    told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "have_met", lambda: True)

    def fail() -> None:
        raise UserError("shared")

    assert told(fail, RANK="0", **PAIR) == "train.py: error: shared\n"
    assert told(fail, RANK="1", **PAIR) == ""

    def fail_alone() -> None:
        raise RankError(UserError("own"), 1)

    assert told(fail_alone, RANK="1", **PAIR) == f"train.py: error: {ALONE}own\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "This process may have"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "cannot write /a/b: No space"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 51 bytes"), "--nce-k"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "(CUDA out of memory. Tried to)"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "set TMPDIR to a folder that can be written",
        ),
    ],
)
def test_a_limit_of_the_machine_is_no_defect_wherever_it_is_met(
    told: Callable[..., str], error: Exception, words: str
) -> None:
    def meet() -> None:
        raise error

    said = told(meet)
    assert said.startswith("train.py: error: ") and said.count("\n") == 1
    assert words in said


def test_other_errors_of_the_system_are_defects() -> None:
    def meet() -> int:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/a")

    with pytest.raises(FileNotFoundError):
        run_command("train.py", meet)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_names_what_was_typed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"], prog="moco-scale")
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert lines[0].startswith(f"usage: moco-scale {name}")
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_each_way_to_start_has_its_name_in_messages(capsys: pytest.CaptureFixture[str]) -> None:
    for prog, name in (("python -m moco_scale", "moco_scale"), ("moco-scale", "moco-scale")):
        assert main(["--help"], prog=prog) == 0
        listed = capsys.readouterr().out
        assert listed.startswith(f"usage: {prog} COMMAND")
        assert all(f"\n  {command}" in listed for command in COMMANDS)
        assert main(["tarin"], prog=prog) == 2
        assert f"{name}: error: unknown command 'tarin'" in capsys.readouterr().err
        assert main(["inspect", ""], prog=prog) == 2
        assert capsys.readouterr().err.startswith(f"{name}: error: the name of what")
        assert main(["--local_rank=1", "inspect", ""], prog=prog) == 2  # as deepspeed --module does
        assert capsys.readouterr().err.startswith(f"{name}: error: the name of what")


def test_the_console_script_is_silent_at_Ctrl_C_from_its_first_import_on() -> None:
    script = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, _ = script["moco-scale"].partition(":")
    look = (
        f"import signal, sys, {module}; "
        "first = [name for name in sys.modules if name.startswith('moco_scale.')]; "
        "print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL, *first[:3])"
    )
    command = [sys.executable, "-c", look]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert printed[0] == "True"
    assert printed[1:] == ["moco_scale.commands", "moco_scale.utils", "moco_scale.utils.quiet"]
