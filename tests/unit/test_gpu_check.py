"""The script that a GPU is checked with: one failure stops nothing, and the table tells all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def summary(repository: Path, out: Path) -> subprocess.CompletedProcess[str]:
    script = repository / "scripts" / "gpu_check" / "summary.py"
    return subprocess.run([sys.executable, script, out], capture_output=True, text=True)


def test_the_table_has_every_check_and_its_numbers(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "results.tsv").write_text(
        "step\t0\t12\nbroken\t1\t3\nslow\t124\t60\nsilent\t0\t1\n"
    )
    (tmp_path / "step.log").write_text('noise {\n{"bf16_run": 812.5}\na last word of a library\n')
    (tmp_path / "broken.log").write_text("Traceback\n{not json\n")
    (tmp_path / "slow.log").write_text("")
    done = summary(repository, tmp_path)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert any("step" in line and "good" in line and "12 s" in line for line in lines)
    assert any("bf16_run" in line and "812.5" in line for line in lines)
    assert any("broken" in line and "FAILED (1)" in line for line in lines)
    assert any("slow" in line and "TOO LONG" in line for line in lines)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["step"] == {"status": 0, "seconds": 12, "bf16_run": 812.5}
    assert list(written) == ["step", "broken", "slow", "silent"]


def test_no_results_is_an_error(repository: Path, tmp_path: Path) -> None:
    done = summary(repository, tmp_path)
    assert done.returncode == 2
    assert "no check has run" in done.stderr


def test_an_unknown_option_is_named(repository: Path) -> None:
    script = repository / "scripts" / "gpu_check.sh"
    done = subprocess.run([script, "--huge"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown option --huge" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_check_runs_on_a_cpu(repository: Path, tmp_path: Path) -> None:
    script = repository / "scripts" / "gpu_check.sh"
    done = subprocess.run(
        [script, "--tiny", "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "summary.json").read_text())
    names = [
        "tests",
        "engines",
        "spanning",
        "hybrid",
        "half",
        "step",
        "augment",
        "contrast",
        "cifar10",
    ]
    assert list(checks) == names
    assert [checks[name]["cells"] for name in names[1:4]] == [2, 1, 1]
    assert checks["half"]["skipped"] > 0
    assert checks["step"]["fp32_run"] > 0
    assert 0 < checks["cifar10"]["knn_top1"] <= 100
