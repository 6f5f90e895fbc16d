"""ShuffleBN: sending each rank its uint8 crops against gathering everybody's fp32 images.

    python benchmarks/shuffle.py [--quick] [--ranks 2 4 8] [--batch 64] [--size 112] [--repeats N]

The first is what this package does: :class:`methods.shuffle_bn.ShuffleBN`, an all-to-all of the
crops that a rank will encode, unpacked into their order, the permutation included. The second is
the usual way: every rank gathers the normalised images of all ranks into one preallocated-size
tensor and indexes its part out of it; its permutation is free. Ranks are gloo processes of this
machine. Repeats of the two alternate, all in the same processes; a repeat lasts until its slowest
rank is done. Both must deliver the same crops, which is checked.

Then a training step (ResNet-18, 2 ranks, forward, backward and update, without the encoders'
gradients being averaged) with ``--shuffle-bn world`` and ``off``, in turn: the exchange is started
before the query's forward pass and waited for after it.

Prints a table of medians and, as its last line, one JSON object. For R of 2, 4, 8 ranks:

    alltoall_ms_R_ranks               median time of the first, milliseconds
    allgather_ms_R_ranks              median time of the second, milliseconds
    speedup_vs_allgather_R_ranks      median of the repeats' ratios, second over first
    bytes_sent_R_ranks                bytes that a rank hands to its all-to-all: B crops of uint8
    bytes_allgather_R_ranks           bytes that a rank ends up with: R x B images of fp32
    bytes_sent_vs_allgather_R_ranks   the first over the second
    step_ms_world, step_ms_off        median time of the training step, milliseconds
    step_world_vs_off                 median of the repeats' ratios
    step_wait_ms                      median time the step with "world" waits for its crops
    batch_per_rank, image_size, repeats, torch, threads_per_rank
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco_scale.distributed import collectives
from moco_scale.distributed.spawn import run_ranks
from moco_scale.methods.key_queue import KeyQueue
from moco_scale.methods.moco import MoCo, momentum_update
from moco_scale.methods.shuffle_bn import ShuffleBN
from moco_scale.models.batchnorm import set_groups
from moco_scale.models.encoder import build_encoder

SEED = 0
WARM_UP = 2


class Measured(NamedTuple):
    """Measurements of one number of ranks; times in seconds, one for each repeat."""

    ours: list[float]
    gathering: list[float]
    bytes_sent: int
    bytes_gathered: int


def measure(batch: int, size: int, repeats: int) -> Measured:
    """Measure on this rank, one of several."""
    rank, world = collectives.rank(), collectives.world_size()
    generator = torch.Generator().manual_seed(rank)
    crops = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    images = crops.float()
    shuffle = ShuffleBN(world * batch, SEED)
    mine = slice(rank * batch, (rank + 1) * batch)

    def exchange(step: int) -> Tensor:
        return shuffle.send(crops, step).wait()

    def gather(step: int) -> Tensor:
        wanted = orders[step]
        return collectives.all_gather_rows(images).index_select(0, wanted)

    # The usual code draws one permutation on one rank; here it costs nothing.
    orders = [torch.from_numpy(shuffle.permutation(s)[mine]) for s in range(WARM_UP + repeats)]
    ours, gathering = [], []
    for step in range(WARM_UP + repeats):
        times: dict[Callable[[int], Tensor], float] = {}
        results: dict[Callable[[int], Tensor], Tensor] = {}
        # Neither always follows the other.
        for way in (exchange, gather) if step % 2 else (gather, exchange):
            collectives.barrier()
            start = time.perf_counter()
            results[way] = way(step)
            collectives.barrier()  # the slowest rank decides
            times[way] = time.perf_counter() - start
        if not torch.equal(results[exchange].float(), results[gather]):
            raise AssertionError("the two ways deliver different crops")
        del results
        if step >= WARM_UP:
            ours.append(times[exchange])
            gathering.append(times[gather])
    gathered = world * images.numel() * images.element_size()
    return Measured(ours, gathering, crops.numel() * crops.element_size(), gathered)


STEP_BATCH, STEP_SIZE, RATE, T, QUEUE = 16, 64, 0.03, 0.2, 4096


def measure_step(repeats: int) -> dict[str, list[float]]:
    """Seconds of each training step with and without the exchange, and of waiting for it."""
    rank, world = collectives.rank(), collectives.world_size()
    batch = STEP_BATCH * world
    generator = torch.Generator().manual_seed(rank)
    shape = (2, STEP_BATCH, 3, STEP_SIZE, STEP_SIZE)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    moco = MoCo(build_encoder("resnet18")).train()
    set_groups(moco, STEP_BATCH, batch)
    weights, averages = moco.parameter_pairs()
    sgd = torch.optim.SGD(weights, lr=RATE)
    queue = KeyQueue(QUEUE, 128, SEED, "cpu")
    mine, images = slice(rank * STEP_BATCH, (rank + 1) * STEP_BATCH), np.arange(batch)
    times: dict[str, list[float]] = {"world": [], "off": [], "wait": []}
    for step in range(WARM_UP + repeats):
        for mode in ("world", "off") if step % 2 else ("off", "world"):
            collectives.barrier()
            start = time.perf_counter()
            exchange = ShuffleBN(batch, SEED, mode).send(views[1], step)
            (query,) = moco(views[0] / 255)
            before = time.perf_counter()
            crops = exchange.wait()
            waited = time.perf_counter() - before
            keys = exchange.gather_back(moco.keys(crops / 255))
            queue.contrast(query, keys[mine], T, images[mine]).loss.mean().backward()
            sgd.step()
            sgd.zero_grad()
            momentum_update(averages, weights, 0.999)
            queue.enqueue(keys)
            collectives.barrier()  # the slowest rank decides
            if step >= WARM_UP:
                times[mode].append(time.perf_counter() - start)
                if mode == "world":
                    times["wait"].append(waited)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    parser.add_argument("--batch", type=int, default=64, help="crops of each rank")
    parser.add_argument("--size", type=int, default=112, help="side of a crop in pixels")
    parser.add_argument("--repeats", type=int, help="timed repeats (default 20, --quick 4)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    repeats = args.repeats or (4 if args.quick else 20)
    print(
        f"ShuffleBN of {args.batch} crops of 3x{args.size}x{args.size} a rank, "
        f"median of {repeats} repeats, {os.cpu_count()} cores\n"
        f"{'ranks':>5} {'all-to-all uint8':>17} {'all-gather fp32':>16} {'speed-up':>9} "
        f"{'MB sent':>8} {'MB gathered':>12}"
    )
    result: dict[str, Any] = {}
    for world in args.ranks:
        got = run_ranks(measure, world, args.batch, args.size, repeats)[0]
        ours, gathering = statistics.median(got.ours), statistics.median(got.gathering)
        ratio = statistics.median(
            slow / fast for slow, fast in zip(got.gathering, got.ours, strict=True)
        )
        print(
            f"{world:>5} {ours * 1e3:>14.1f} ms {gathering * 1e3:>13.1f} ms {ratio:>8.1f}x "
            f"{got.bytes_sent / 1e6:>8.1f} {got.bytes_gathered / 1e6:>12.1f}",
            flush=True,
        )
        result |= {
            f"alltoall_ms_{world}_ranks": round(ours * 1e3, 2),
            f"allgather_ms_{world}_ranks": round(gathering * 1e3, 2),
            f"speedup_vs_allgather_{world}_ranks": round(ratio, 2),
            f"bytes_sent_{world}_ranks": got.bytes_sent,
            f"bytes_allgather_{world}_ranks": got.bytes_gathered,
            f"bytes_sent_vs_allgather_{world}_ranks": got.bytes_sent / got.bytes_gathered,
        }
    step = run_ranks(measure_step, 2, repeats)[0]
    step_ms = {name: statistics.median(times) * 1e3 for name, times in step.items()}
    step_ratio = statistics.median(a / b for a, b in zip(step["world"], step["off"], strict=True))
    print(
        f"\ntraining step, 2 ranks of {STEP_BATCH} images of 3x{STEP_SIZE}x{STEP_SIZE}: world "
        f"{step_ms['world']:.1f} ms, of which {step_ms['wait']:.2f} ms wait for crops; off "
        f"{step_ms['off']:.1f} ms; ratio {step_ratio:.3f}"
    )
    result |= {
        "step_ms_world": round(step_ms["world"], 2),
        "step_ms_off": round(step_ms["off"], 2),
        "step_world_vs_off": round(step_ratio, 4),
        "step_wait_ms": round(step_ms["wait"], 3),
        "batch_per_rank": args.batch,
        "image_size": args.size,
        "repeats": repeats,
        "threads_per_rank": 1,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
