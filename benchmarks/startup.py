"""Start to first batch on an index of ImageNet's size, and the memory it takes on each rank.

    python benchmarks/startup.py [--quick] [--shards N] [--ranks N] [--workers N] [--folder DIR]

Makes a set of synthetic shards: sparse tars of 1,000 images each, 110 KB apart, of which only
those that the first batch reads are really there, and their index. Then so many ranks, each a
process of its own, start at once, as those of one node do, and read their first share of a global
batch of 256. A rank measures itself after each of the steps, and all of them and their workers
once more while all are alive. Private memory is what nobody else could share: Private_Clean and
Private_Dirty of /proc/PID/smaps_rollup; a page of the index that eight ranks map counts an eighth
in Pss.

Shards that come without an index are measured on --scan of them, with all their headers in place:
one process, in the page cache.

Prints a table and, as its last line, one JSON object. Seconds are the medians over ranks, and
memory is in MiB:

    import_s                    interpreter, torch and moco_scale: not this benchmark's subject
    open_s                      the index is mapped and checked, every shard is there
    plan_s                      the order of the first epoch
    first_batch_s               workers forked, first batch decoded
    start_to_first_batch_s      from the start of the process, slowest rank
    import_private, open_private, plan_private    private memory after each step
    index_mib                   size of the index's file
    index_rss, index_pss        of its mapping, per rank, all ranks alive
    index_private               of it, what a rank has alone
    worker_private              median of all workers
    tree_pss                    a rank and its workers, all alive: what is shared counts by parts
    scan_us_per_sample          CPU time to index one sample of shards that came without an index
    headers_us_per_sample       CPU time to read one sample's headers, as the first start does of
                                shards with an index that were copied from elsewhere
    samples, shards, ranks, workers, numpy, torch
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

PER_SHARD, STRIDE, BATCH, SIZE = 1000, 110 * 1024, 256, 224


def jpeg() -> bytes:
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def make_shards(folder: Path, shards: int) -> None:
    """An index of sparse tars; the images of the first batch are written."""
    import numpy as np

    from moco_scale.data.sampling.order import BatchPlan, FullPermutation
    from moco_scale.data.shards import index_file
    from moco_scale.data.shards.header_check import IndexedTars, note_checked

    samples = shards * PER_SHARD
    size = PER_SHARD * STRIDE + 2 * tarfile.BLOCKSIZE
    number = np.arange(samples)
    rows = np.zeros(samples, index_file.INDEX_DTYPE)
    image = jpeg()
    rows["shard"], rows["size"] = number // PER_SHARD, len(image)
    rows["offset"] = number % PER_SHARD * STRIDE + tarfile.BLOCKSIZE
    rows["label"] = number % 1000
    names = [f"train-{shard:06d}.tar" for shard in range(shards)]
    for name in names:
        (folder / name).touch()
        os.truncate(folder / name, size)
    for sample in BatchPlan(FullPermutation(samples, 0), BATCH).batch(0).index.tolist():
        with (folder / names[rows["shard"][sample]]).open("r+b") as file:
            file.seek(int(rows["offset"][sample]))
            file.write(image)
    np.save(folder / index_file.index_name("train"), rows)
    entry = index_file.split_entry("train", rows, [(name, size, PER_SHARD) for name in names])
    header = {
        "format": index_file.FORMAT,
        "version": index_file.VERSION,
        "classes": [f"n{i:08d}" for i in range(1000)],
        "splits": {"train": entry},
    }
    (folder / index_file.INDEX_JSON).write_text(json.dumps(header))
    tars = [folder / name for name in names]
    changed = [tar.stat().st_mtime_ns for tar in tars]
    note_checked(IndexedTars(folder, "train", entry["checksum"], tars, changed, rows))


def scan_cost(folder: Path, shards: int) -> tuple[float, float]:
    """Measure microseconds of CPU time a sample, to index tars, and to read only their headers."""
    from moco_scale.data.shards.tar_scan import member_places, scan_tar

    # Bodies are sparse: only the headers' pages are read, as in a real tar.
    for shard in range(shards):
        with (folder / f"{shard}.tar").open("wb") as file:
            for key in range(PER_SHARD):
                for suffix, size in (("jpg", STRIDE - 3 * tarfile.BLOCKSIZE), ("cls", 3)):
                    info = tarfile.TarInfo(f"{key:09d}.{suffix}")
                    info.size = size
                    file.write(info.tobuf(tarfile.USTAR_FORMAT))
                    body = file.tell()
                    if suffix == "cls":
                        file.write(f"{key:03d}".encode())
                    file.seek(body + size + -size % tarfile.BLOCKSIZE)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        start = time.process_time()
        for shard in range(shards):
            scan = scan_tar(folder / f"{shard}.tar")
            assert len(scan.offset) == PER_SHARD
        scanned = time.process_time()
        for shard in range(shards):
            assert len(member_places(folder / f"{shard}.tar")) == 2 * PER_SHARD
        spent = scanned - start, time.process_time() - scanned
        for of, seconds in zip(times, spent, strict=True):
            of.append(seconds / (shards * PER_SHARD) * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


def memory_mib(kind: str, pid: int | str = "self") -> float:
    """Measure a process's memory: "Pss", or "Private_", clean and dirty together."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    names = "Pss" if kind == "Pss" else "Private_(?:Clean|Dirty)"
    return sum(int(n) for n in re.findall(rf"^{names}:\s+(\d+) kB", text, re.MULTILINE)) / 1024


def mapping_mib(name: str) -> dict[str, float]:
    """Rss, Pss and private memory of this process's mapping of a file."""
    text = Path("/proc/self/smaps").read_text()
    found = re.search(rf"{re.escape(name)}\n((?:\w+:.*\n)+)", text)
    assert found is not None, f"{name} is not mapped"
    sizes = {key: int(n) / 1024 for key, n in re.findall(r"(\w+):\s+(\d+) kB", found.group(1))}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"index_rss": sizes["Rss"], "index_pss": sizes["Pss"], "index_private": private}


def one_rank(folder: Path, rank: int, ranks: int, workers: int, started: float) -> None:
    """Measures itself, says so, waits until all have, and measures what is shared."""
    from moco_scale.data.images.augment import AUGMENTATIONS
    from moco_scale.data.loading.loader import pretraining_loader
    from moco_scale.data.open import open_shards
    from moco_scale.data.sampling.order import BatchPlan

    found: dict[str, Any] = {}
    last = started

    def passed(step: str) -> None:
        nonlocal last
        found[f"{step}_s"] = time.time() - last
        found[f"{step}_private"] = memory_mib("Private_")
        last = time.time()

    passed("import")
    shards = open_shards(folder, "train")
    passed("open")
    plan = BatchPlan(shards.order(0), BATCH)
    plan.batch(0)
    passed("plan")
    steps = plan.steps_per_epoch
    with pretraining_loader(
        shards,
        plan,
        AUGMENTATIONS["v2"],
        SIZE,
        rank=rank,
        world=ranks,
        num_workers=workers,
        end_step=min(steps, max(workers, 1)),  # the images of the other batches do not exist
    ) as loader:
        batch = next(loader)
        assert batch.views.shape == (2, BATCH // ranks, 3, SIZE, SIZE)
        found["first_batch_s"] = time.time() - last
        found["start_to_first_batch_s"] = time.time() - started
        print("ready", flush=True)
        sys.stdin.readline()
        children = [process.pid for process in multiprocessing.active_children()]
        found["workers"] = [memory_mib("Private_", pid) for pid in children if pid is not None]
        found["tree_pss"] = sum(memory_mib("Pss", pid) for pid in ("self", *children) if pid)
        found |= mapping_mib("train-index.npy")
        print(json.dumps(found), flush=True)
        sys.stdin.readline()


def measure(folder: Path, ranks: int, workers: int) -> list[dict[str, Any]]:
    """Start all ranks at once and return their measurements."""
    command = [sys.executable, __file__, "--folder", str(folder), "--ranks", str(ranks)]
    command += ["--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    processes = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--started", repr(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        lines: list[str] = []
        for kind in ("ready", "numbers"):
            lines = []
            for process in processes:
                assert process.stdout is not None
                lines.append(process.stdout.readline())
                assert lines[-1], f"a rank ended before it had its {kind}"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        return [json.loads(line) for line in lines]
    finally:
        for process in processes:
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", type=int, help="of 1,000 (default 1282, --quick 200)")
    parser.add_argument("--ranks", type=int, help="on this machine (default 8, --quick 4)")
    parser.add_argument("--workers", type=int, default=2, help="of each rank")
    parser.add_argument("--scan", type=int, default=4, help="shards to index")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        one_rank(Path(args.folder), args.rank, args.ranks, args.workers, args.started)
        return
    shards = args.shards or (200 if args.quick else 1282)
    ranks = args.ranks or (4 if args.quick else 8)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder, without_index = Path(scratch) / "shards", Path(scratch) / "scan"
        folder.mkdir()
        without_index.mkdir()
        make_shards(folder, shards)
        scan, headers = scan_cost(without_index, args.scan)
        found = measure(folder, ranks, args.workers)
        index_mib = (folder / "train-index.npy").stat().st_size / 2**20
    import numpy
    import torch

    workers = [mib for rank in found for mib in rank.pop("workers")]
    result: dict[str, Any] = {
        key: round(statistics.median(rank[key] for rank in found), 3) for key in found[0]
    }
    slowest = max(rank["start_to_first_batch_s"] for rank in found)
    result["start_to_first_batch_s"] = round(slowest, 3)
    result |= {
        "index_mib": round(index_mib, 2),
        "worker_private": round(statistics.median(workers), 2) if workers else 0.0,
        "scan_us_per_sample": round(scan, 1),
        "headers_us_per_sample": round(headers, 1),
        "samples": shards * PER_SHARD,
        "shards": shards,
        "ranks": ranks,
        "workers": args.workers,
        "numpy": numpy.__version__,
        "torch": torch.__version__,
    }
    print(
        f"{result['samples']} samples in {shards} shards, {ranks} ranks of {args.workers} workers"
    )
    print(f"{'':24}{'seconds':>10}{'private MiB':>14}")
    for step, key in (
        ("interpreter, imports", "import"),
        ("index opened, checked", "open"),
        ("order of an epoch", "plan"),
    ):
        print(f"{step:24}{result[f'{key}_s']:10.2f}{result[f'{key}_private']:14.1f}")
    print(f"{'first batch':24}{result['first_batch_s']:10.2f}")
    print(f"start to first batch, slowest rank: {slowest:.2f} s")
    print(
        f"the index, {result['index_mib']} MiB: each rank maps {result['index_rss']:.1f} MiB, pays "
        f"{result['index_pss']:.1f}, and has {result['index_private']:.1f} alone"
    )
    print(f"a worker has {result['worker_private']:.1f} MiB of its own")
    print(f"a rank with its workers: {result['tree_pss']:.1f} MiB (Pss)")
    print(f"indexing what has no index: {scan:.1f} microseconds a sample and core")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
