"""The queue and its loss: this package against the usual implementation, and shared among ranks.

    python benchmarks/queue.py [--quick] [--ranks 1 2 4 8] [--keys 65536 1048576 4194304]
                               [--queries 256] [--dim 128] [--dtype fp32 bf16] [--repeats N]

First, on one process, InfoNCE over a replicated queue, forward and backward. The usual way clones
the queue, makes all logits with einsum, concatenates, divides and calls cross_entropy. Repeats
alternate; both must give the same loss and gradient, which is checked. Its times are CPU times of
one thread, so that whoever else uses the machine hardly counts. It is measured twice: in a process
with the C library's own settings, in which any code runs; and in one that keeps freed memory, as
this package's runs do, which spares the usual way most of its page faults.

Then the queue sharded over R gloo ranks of this machine, for a global batch of the same
``--queries``: peak memory of a rank, the queue included, beside its share of the keys; CPU time of
a rank for loss, gradient and enqueueing, which does not depend on how many ranks share a core; wall
time, which does; and bytes that a rank hands to collectives, besides the keys that every queue has
to be given anyway. A replicated queue of that length takes R times the share on every rank.

Memory is counted in two ways, in a fresh process: what tensors take at their peak, by the record
that the profiler keeps of every allocation; and what the kernel says, the growth of the resident
set up to its peak (VmHWM, reset before) after a warm-up on a few thousand keys. The second has a
few MiB of odds and ends, such as the buffers of gloo and of BLAS, that do not grow with the queue.

Prints two tables and, as its last line, one JSON object:

    infonce_time_vs_usual       median of the repeats' ratios, ours over usual (65,536 keys)
    infonce_time_vs_usual_kept  the same where freed memory is kept
    infonce_memory_vs_usual     extra peak resident memory, ours over usual, without the queue
    infonce_ms, usual_ms, infonce_ms_kept, usual_ms_kept, infonce_extra_mib, usual_extra_mib
    sharded                     one object for each row of the second table: ranks, keys, dtype,
                                share_mib, tensors_mib, resident_mib, chunk_mib, memory_vs_share
                                ((tensors - chunk) / share), cpu_ms, wall_ms, bytes_sent
    sharded_memory_vs_share     the largest memory_vs_share of them
    queries, dim, repeats, torch, threads_per_rank
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "queue":
    # Scripts of this folder that say `import queue`, as torch does, mean the standard library's.
    spec = importlib.machinery.PathFinder.find_spec("queue", [os.path.dirname(os.__file__)])
    assert spec is not None and spec.loader is not None
    sys.modules["queue"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["queue"])
else:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which counts tensors here

    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from moco_scale.distributed import collectives
    from moco_scale.distributed.spawn import run_ranks
    from moco_scale.methods import infonce
    from moco_scale.methods.key_queue import DTYPES, KeyQueue

T, SEED, WARM_UP, MIB = 0.2, 0, 2, 2**20
LENGTH = 65536


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def ours(query: Tensor, positive: Tensor, keys: Tensor) -> Tensor:
    return infonce.infonce(query, positive, infonce.Negatives(keys), T).loss.mean()


def usual(query: Tensor, positive: Tensor, keys: Tensor) -> Tensor:
    """As the public implementations have it."""
    own = torch.einsum("nc,nc->n", query, positive).unsqueeze(-1)
    others = torch.einsum("nc,ck->nk", query, keys.clone().detach().T)
    logits = torch.cat([own, others], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "usual": usual}


def differentiated(way: str, query: Tensor, positive: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    q = query.detach().requires_grad_()
    loss = WAYS[way](q, positive, keys)
    return loss.detach(), *torch.autograd.grad(loss, q)


class Peak:
    """Growth of this process's resident memory up to its peak, from when it was made."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed must be asked for again
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        self.start = self._read("VmRSS")

    def mib(self) -> float:
        return (self._read("VmHWM") - self.start) / 1024

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found.group(1))


def tensor_peak(action: Callable[[], object]) -> float:
    """MiB that tensors take at most while something runs, besides those that were there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        action()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0) / MIB


def extra_memory(way: str, queries: int, dim: int) -> float:
    """MiB that one loss and its gradient need besides the queue."""
    keys = unit_rows(LENGTH, dim, 1)
    query, positive = unit_rows(queries, dim, 4), unit_rows(queries, dim, 5)
    differentiated(way, query, positive, keys[:4096])
    peak = Peak()
    differentiated(way, query, positive, keys)
    return peak.mib()


def compare(queries: int, dim: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each repeat; with one thread, that is the time it takes on an idle core."""
    keys, query, positive = (
        unit_rows(n, dim, seed) for seed, n in enumerate((LENGTH, queries, queries))
    )
    times: dict[str, list[float]] = {"ours": [], "usual": []}
    for repeat in range(WARM_UP + repeats):
        results = {}
        for way in ("ours", "usual") if repeat % 2 else ("usual", "ours"):
            start = time.process_time()
            results[way] = differentiated(way, query, positive, keys)
            if repeat >= WARM_UP:
                times[way].append(time.process_time() - start)
        for mine, theirs in zip(results["ours"], results["usual"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    return times


def sharded(length: int, dim: int, queries: int, dtype: str, repeats: int) -> dict[str, float]:
    """On this rank: MiB at the peak, CPU and wall seconds, bytes sent."""
    rank, world = collectives.rank(), collectives.world_size()
    mine = slice(rank * queries // world, (rank + 1) * queries // world)
    query, keys = unit_rows(queries, dim, 1), unit_rows(queries, dim, 2)
    images = np.arange(queries)
    sent = _count_bytes()

    def step(queue: KeyQueue) -> None:
        q = query[mine].detach().requires_grad_()
        loss = queue.contrast(q, keys[mine], T, images[mine]).loss.mean()
        torch.autograd.grad(loss, q)
        queue.enqueue(keys, images)

    place: dict[str, Any] = {"dtype": DTYPES[dtype], "shard": (rank, world)}
    step(KeyQueue(4096 * world, dim, SEED, "cpu", **place))
    peak = Peak()
    queue = KeyQueue(length, dim, SEED, "cpu", **place)
    step(queue)
    resident = peak.mib()
    sent.clear()
    cpu, wall = [], []
    for _ in range(repeats):
        collectives.barrier()
        starts = time.process_time(), time.perf_counter()
        step(queue)
        cpu.append(time.process_time() - starts[0])
        collectives.barrier()
        wall.append(time.perf_counter() - starts[1])
    bytes_sent = sum(sent) / repeats
    del queue
    tensors = tensor_peak(lambda: step(KeyQueue(length, dim, SEED, "cpu", **place)))
    return {
        "resident": resident,
        "tensors": tensors,
        "cpu": statistics.median(cpu),
        "wall": statistics.median(wall),
        "sent": bytes_sent,
    }


def _count_bytes() -> list[int]:
    """The sizes of what is handed to collectives from now on."""
    sent: list[int] = []
    for name in ("all_gather_rows", "reduce_scatter_rows"):
        real = getattr(collectives, name)

        def watched(rows: Tensor, real: Any = real) -> Tensor:
            sent.append(rows.numel() * rows.element_size() if collectives.world_size() > 1 else 0)
            return real(rows)

        setattr(collectives, name, watched)
    return sent


def chunk_bytes(queries: int, dim: int) -> int:
    """One block of logits and the keys they are made with, in fp32."""
    rows = max(infonce._BLOCK_CPU // queries, 256)
    return 4 * rows * (queries + dim)


def summary(times: dict[str, list[float]]) -> tuple[dict[str, float], float]:
    """Median milliseconds of both ways, and the median of the repeats' ratios."""
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["usual"], strict=True))
    return {way: statistics.median(times[way]) * 1e3 for way in WAYS}, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", help="default 1 2 4 8, --quick 1 2 4")
    parser.add_argument("--keys", type=int, nargs="+", help="default 65536 1048576 4194304")
    parser.add_argument("--queries", type=int, default=256, help="of the global batch")
    parser.add_argument("--dim", type=int, default=128, help="of a key")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default all")
    parser.add_argument("--repeats", type=int, help="timed repeats (default 20, --quick 5)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    repeats = args.repeats or (5 if args.quick else 20)
    ranks = args.ranks or ([1, 2, 4] if args.quick else [1, 2, 4, 8])
    lengths = args.keys or ([65536, 524288] if args.quick else [65536, 1048576, 4194304])
    dtypes = args.dtype or (["fp32"] if args.quick else list(DTYPES))

    torch.set_num_threads(1)
    ms, ratio = summary(compare(args.queries, args.dim, repeats))
    kept_ms, kept_ratio = summary(run_ranks(compare, 1, args.queries, args.dim, repeats)[0])
    memory = {way: run_ranks(extra_memory, 1, way, args.queries, args.dim)[0] for way in WAYS}
    print(
        f"InfoNCE, {args.queries} queries against {LENGTH} keys of {args.dim}, forward and "
        f"backward, median of {repeats} repeats, one thread, {os.cpu_count()} cores\n"
        f"{'':6} {'time':>10} {'freed is kept':>14} {'extra memory':>14}"
    )
    for way in WAYS:
        print(f"{way:6} {ms[way]:>7.1f} ms {kept_ms[way]:>11.1f} ms {memory[way]:>10.1f} MiB")
    saved = memory["ours"] / memory["usual"]
    print(f"{'ratio':6} {ratio:>10.3f} {kept_ratio:>14.3f} {saved:>14.3f}\n", flush=True)

    chunk = chunk_bytes(args.queries, args.dim) / MIB
    print(
        f"sharded, {args.queries} queries over all ranks, one chunk {chunk:.1f} MiB\n"
        f"{'ranks':>5} {'keys':>9} {'':5} {'share':>11} {'tensors':>11} {'resident':>11} "
        f"{'(tensors-chunk)/share':>21} {'CPU a rank':>11} {'wall':>10} {'sent a rank':>12}"
    )
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for dtype in dtypes:
            for world in ranks:
                got = run_ranks(
                    sharded, world, length, args.dim, args.queries, dtype, max(repeats // 4, 2)
                )
                share = length * args.dim * DTYPES[dtype].itemsize / world / MIB
                tensors, resident = (max(r[n] for r in got) for n in ("tensors", "resident"))
                row = {
                    "ranks": world,
                    "keys": length,
                    "dtype": dtype,
                    "share_mib": round(share, 2),
                    "tensors_mib": round(tensors, 2),
                    "resident_mib": round(resident, 2),
                    "chunk_mib": round(chunk, 2),
                    "memory_vs_share": round((tensors - chunk) / share, 3),
                    "cpu_ms": round(statistics.mean(r["cpu"] for r in got) * 1e3, 2),
                    "wall_ms": round(max(r["wall"] for r in got) * 1e3, 2),
                    "bytes_sent": int(got[0]["sent"]),
                }
                rows.append(row)
                cpu_ms, wall_ms = row["cpu_ms"], row["wall_ms"]
                print(
                    f"{world:>5} {length:>9} {dtype:5} {share:>7.1f} MiB {tensors:>7.1f} MiB "
                    f"{resident:>7.1f} MiB {row['memory_vs_share']:>21.3f} {cpu_ms:>8.1f} ms "
                    f"{wall_ms:>7.1f} ms {row['bytes_sent']:>12}",
                    flush=True,
                )
    print(
        json.dumps(
            {
                "infonce_time_vs_usual": round(ratio, 4),
                "infonce_time_vs_usual_kept": round(kept_ratio, 4),
                "infonce_memory_vs_usual": round(saved, 4),
                "infonce_ms": round(ms["ours"], 2),
                "usual_ms": round(ms["usual"], 2),
                "infonce_ms_kept": round(kept_ms["ours"], 2),
                "usual_ms_kept": round(kept_ms["usual"], 2),
                "infonce_extra_mib": round(memory["ours"], 2),
                "usual_extra_mib": round(memory["usual"], 2),
                "sharded_memory_vs_share": max(row["memory_vs_share"] for row in rows),
                "sharded": rows,
                "queries": args.queries,
                "dim": args.dim,
                "repeats": repeats,
                "threads_per_rank": 1,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
