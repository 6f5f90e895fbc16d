"""Time that the training loop waits for a checkpoint, written in the background or not.

    python benchmarks/save.py [--quick] [--gigabytes 1.0] [--repeats 5] [--folder DIR]

One process saves a state through :class:`checkpoints.run_folder.RunFolder`, as a run does: copy,
checkpoint, checksums, fsync, rename, ``current.pth``. Both ways alternate. While the background
writes, the loop multiplies matrices on one thread, and how much slower that is meanwhile is shown
too. A way's first save, which finds no memory to copy to, is not counted.

Prints a table of medians and, as its last line, one JSON object:

    sync_s, async_s           seconds that saving keeps the loop waiting, not and in the background
    async_stall_vs_sync       median of the repeats' ratios, second over first
    written_s                 seconds until the background has written everything
    slowdown_meanwhile        time of the loop's work while it writes, over that while it does not
    gigabytes, repeats, torch
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_scale.checkpoints.run_folder import RunFolder
from moco_scale.config.resolve import build

TENSORS = 64


def run_folder(path: Path, background: bool) -> RunFolder:
    values: dict[str, Any] = {"output_dir": str(path), "async_save": background}
    folder = RunFolder(build("v2", values | {"keep_checkpoints": 1}), "benchmark")
    folder.prepare()
    return folder


def work(left: Tensor) -> float:
    """Seconds of one piece of what training does meanwhile."""
    start = time.perf_counter()
    left @ left
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, help="of state (default 1, --quick 0.1)")
    parser.add_argument("--repeats", type=int, help="of each way (default 5, --quick 3)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    gigabytes = args.gigabytes or (0.1 if args.quick else 1.0)
    repeats = args.repeats or (3 if args.quick else 5)
    torch.set_num_threads(1)
    numbers = int(gigabytes * 1e9 / 4 / TENSORS)
    # A third of a run's state are the query's weights, a third the key's, a third momentum.
    tensors = {f"model.query.{i}": torch.randn(numbers) for i in range(TENSORS)}
    model = {name: name.replace("query", "x") for name in list(tensors)[: TENSORS * 2 // 3]}
    left = torch.randn(700, 700)
    undisturbed = statistics.median(work(left) for _ in range(20))
    times: dict[bool, list[float]] = {False: [], True: []}
    written, meanwhile = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folders = {way: run_folder(Path(name) / str(way), way) for way in times}
        for step in range(1, repeats + 2):
            for background, folder in folders.items():
                meta = {"step": step, "epoch": 0}
                start = time.perf_counter()
                folder.save(step, tensors, model, meta, keep=False)
                waited = time.perf_counter() - start
                if background:
                    thread = folder._saver._thread
                    while thread is not None and thread.is_alive():
                        meanwhile.append(work(left))
                    folder.finish_saving()
                    written.append(time.perf_counter() - start)
                if step > 1:
                    times[background].append(waited)
    ratio = statistics.median(a / s for a, s in zip(times[True], times[False], strict=True))
    result = {
        "sync_s": round(statistics.median(times[False]), 3),
        "async_s": round(statistics.median(times[True]), 3),
        "async_stall_vs_sync": round(ratio, 3),
        "written_s": round(statistics.median(written[1:]), 3),
        "slowdown_meanwhile": round(statistics.median(meanwhile) / undisturbed, 2),
        "gigabytes": gigabytes,
        "repeats": repeats,
        "torch": torch.__version__,
    }
    print(f"a state of {gigabytes} GB, median of {repeats} repeats")
    print(f"not in the background: the loop waits {result['sync_s']:.3f} s")
    print(
        f"in the background:     the loop waits {result['async_s']:.3f} s, {ratio:.3f} of that; "
        f"all is written after {result['written_s']:.3f} s, "
        f"meanwhile its work takes {result['slowdown_meanwhile']} times as long"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
