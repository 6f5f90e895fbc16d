"""What is said comes in whole lines, is fit to be shown, and is never the end of a program."""

import argparse
import ast
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moco_scale.commands import evaluate_flags
from moco_scale.config import command_line
from moco_scale.distributed import collectives
from moco_scale.utils.log import log, show_from, tell

WRITERS, LINES = 8, 200
TALK = f"""
import sys
from moco_scale.utils.log import log
for number in range({LINES}):
    log.info(sys.argv[1] * 60)
"""
OUTLIVE = """
import logging, os, sys, warnings
from moco_scale.utils.log import log as ours, outlive_terminal, tell, unwritten
outlive_terminal()
log = logging.StreamHandler(sys.stdout)
if sys.argv[1] == "closed pipe":
    sys.stdin.read()  # until the reader is gone
for _ in range(20_000 if sys.argv[1] != "whole" else 1):
    print("of a library: caf\\udce9")
    tell("one\\x1b[2J")
ours.info("two"), print("three", file=sys.stderr), warnings.warn("four")
logging.getLogger("x").addHandler(log), logging.getLogger("x").error("five"), print("", end="\\r")
assert os.open(os.devnull, os.O_RDONLY) > 2
with open(sys.argv[2], "w") as file:
    file.write(f"done, {unwritten()}")
"""


def test_lines_of_several_processes_do_not_mix() -> None:
    """As launchers start them, unbuffered, all into one pipe."""
    reading, writing = os.pipe()
    command = (sys.executable, "-u", "-c", TALK)
    writers = [subprocess.Popen([*command, str(i)], stderr=writing) for i in range(WRITERS)]
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        lines = pipe.read().splitlines()
    assert [writer.wait() for writer in writers] == [0] * WRITERS
    assert sorted(lines) == sorted(str(i) * 60 for i in range(WRITERS) for _ in range(LINES))


def test_foreign_text_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("a\x1b[2J\x07b\u2028c\udce9\nof our own")
    tell("a\rb\u202e")
    captured = capsys.readouterr()
    assert captured.err == "a\\x1b[2J\\x07b\\u2028c\\xe9\nof our own\n"
    assert captured.out == "a\\rb\\u202e\n"


@pytest.fixture
def usual_level() -> Iterator[None]:
    yield
    show_from("info")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", "a\nb\nwarning: c\nx.py: error: d\n"),
        ("info", "b\nwarning: c\nx.py: error: d\n"),
        ("warning", "warning: c\nx.py: error: d\n"),
        ("error", "x.py: error: d\n"),
    ],
)
def test_a_level_hides_what_is_less_important(
    level: str, shown: str, capsys: pytest.CaptureFixture[str], usual_level: None
) -> None:
    show_from(level)
    for log_text, text in ((log.debug, "a"), (log.info, "b"), (log.warning, "c")):
        log_text(text)
    log.error("x.py: error: d")
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_flag_sets_the_level(command: str, usual_level: None) -> None:
    assert command_line.parse([]).run.log_level == "info"
    assert log.level == logging.INFO
    if command == "train":
        command_line.parse(["--log-level", "warning"])
    else:
        required = ("--data-dir", "d", "--pretrained-model", "f", "--output-dir", "o")
        parser = argparse.ArgumentParser()
        evaluate_flags.add_arguments(parser)
        evaluate_flags.config_of(parser.parse_args([*required, "--log-level", "warning"]))
    assert log.level == logging.WARNING


def test_what_all_would_say_rank_0_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        collectives.main_log.info(f"for all, by {rank}")
        log.info(f"of its own, by {rank}")
    said = capsys.readouterr().err.splitlines()
    assert said == ["for all, by 0", "of its own, by 0", "of its own, by 1"]


def test_a_message_met_while_another_is_written_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stderr", Busy())
    log.error("of a signal's handler")


@pytest.mark.parametrize("how", ["whole", "closed pipe", "full disk", "closed"])
def test_what_cannot_be_written_ends_nothing(tmp_path: Path, how: str) -> None:
    words = [sys.executable, "-c", OUTLIVE, how, str(tmp_path / "done")]
    full = open("/dev/full", "w") if how == "full disk" else None  # noqa: SIM115
    output = full or subprocess.PIPE
    close = (lambda: os.closerange(0, 3)) if how == "closed" else None
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=output, stderr=output, preexec_fn=close
    )
    if how == "closed pipe":
        assert process.stdout and process.stderr and process.stdin
        process.stdout.close(), process.stderr.close()
        process.stdin.close()
        process.wait(60)
    else:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    lost = "No space left on device" if how == "full disk" else None
    assert (tmp_path / "done").read_text() == f"done, {lost}"
    if how == "whole":
        assert out == b"of a library: caf\\udce9\none\\x1b[2J\nfive\n\r"
        assert err.startswith(b"two\nthree\n") and b"four" in err


def test_nothing_is_printed_past_it(repository: Path) -> None:
    """One place makes text fit to be shown and survives what cannot be written."""
    past = []
    for path in (repository / "moco_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name != "log.py":
                called = ast.unparse(node.func)
                if called in ("print", "sys.stdout.write", "sys.stderr.write"):
                    past.append(f"{path.name}:{node.lineno}")
    assert past == []
