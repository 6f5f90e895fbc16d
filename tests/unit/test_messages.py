"""What is said on standard error comes in whole lines."""

import os
import subprocess
import sys

WRITERS, LINES = 8, 200
TALK = f"""
import sys
from moco_scale.messages import say
for number in range({LINES}):
    say(sys.argv[1] * 60)
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
