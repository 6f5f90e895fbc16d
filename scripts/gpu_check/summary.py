"""The table at the end of ``scripts/gpu_check.sh``: ``python scripts/gpu_check/summary.py OUT``.

``OUT/results.tsv`` has a line for each check: its name, exit status, seconds. Where the last line
of ``OUT/NAME.log`` is a JSON object, its values are printed below the check. Writes
``OUT/summary.json``; its exit status is 1 if a check failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def last_object(log: Path) -> dict[str, Any]:
    """The JSON object that a log ends with; empty where it ends otherwise."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    for line in reversed(lines[-5:]):  # libraries may have a last word
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                return value
    return {}


def main(out: Path) -> int:
    results = out / "results.tsv"
    if not results.exists():
        print(f"no check has run: {results} is missing", file=sys.stderr)
        return 2
    summary: dict[str, Any] = {}
    print("\n" + "=" * 78)
    for line in results.read_text().splitlines():
        name, status, seconds = line.split("\t")
        values = last_object(out / f"{name}.log")
        summary[name] = {"status": int(status), "seconds": int(seconds), **values}
        verdict = {"0": "good", "124": "TOO LONG"}.get(status, f"FAILED ({status})")
        print(f"{name:12}{verdict:14}{seconds:>6} s")
        for key, value in values.items():
            print(f"    {key:44}{value}")
    print("=" * 78)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(check["status"] for check in summary.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
