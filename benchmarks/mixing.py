"""Mixing of the orders: pairs of a batch that come from the same shard, against uniform draws.

    python benchmarks/mixing.py [--quick] [--shards 1282] [--samples 1000] [--batch 256] [--seed 0]

Images of a shard are read from the same place at the same time; were they also alike (shards in
the order of classes, of videos, of days), batches in which they come together would be alike too.
For each order the share of same-shard pairs among all pairs of a batch is counted over whole
epochs and divided by the share in a uniformly shuffled epoch. 1.0 is perfect.

- full: `FullPermutation`, for shards that are all at hand.
- window W: `WindowedPermutation`, W shards in use at a time, rolling.
- blocks W: W shards at a time, permuted and used up before the next W, as a comparison.
- webdataset: its `shuffle(1000)` over shards in random order, one stream for each of 8 workers,
  each making batches of its own, as its documentation shows it.

"worst" is the same of the worst hundredth of an epoch (20 batches at least). "shards" is how many
have to be at hand so that nothing has to be waited for: the most that are begun and not used up
at a time, and the one (of blocks: the whole block) that comes next.

Prints a table and, as its last line, one JSON object. For each ORDER of full, window_W, blocks_W,
webdataset:

    ORDER                        same-shard pairs against uniform, mean over the epochs
    ORDER_worst                  the same of the worst stretch
    ORDER_shards                 shards to have at hand
    shards, samples_per_shard, batch, epochs, seed
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset

from moco_scale.data.sampling.order import FullPermutation
from moco_scale.data.sampling.random import permutation
from moco_scale.data.sampling.windows import WindowedPermutation

WINDOWS = (16, 32, 64, 128, 256)
BUFFER, WORKERS = 1000, 8

ShardIds = npt.NDArray[np.int64]


def blocks(shards: int, samples: int, window: int, seed: int, epoch: int) -> ShardIds:
    """The shard of each sample in an order of blocks: int64 [shards * samples]."""
    order = permutation(shards, seed, "blocks", epoch)
    parts = []
    for start in range(0, shards, window):
        block = np.repeat(order[start : start + window], samples)
        parts.append(block[permutation(len(block), seed, f"block {start}", epoch)])
    return np.concatenate(parts)


def streams(shards: int, samples: int, seed: int, epoch: int, workers: int) -> list[ShardIds]:
    """The shards of what each webdataset worker yields."""
    order = permutation(shards, seed, "streams", epoch)

    def stream(worker: int) -> Iterator[int]:
        for shard in order[worker::WORKERS].tolist():
            yield from [shard] * samples

    return [
        np.fromiter(webdataset.shuffle(BUFFER, rng=random.Random(seed + w))(stream(w)), np.int64)
        for w in range(workers)
    ]


def same_shard(read: ShardIds, batch: int) -> npt.NDArray[np.float64]:
    """Share of same-shard pairs in each whole batch."""
    whole = np.sort(read[: len(read) // batch * batch].reshape(-1, batch), axis=1)
    shares = np.empty(len(whole))
    for i, row in enumerate(whole):
        counts = np.diff(np.flatnonzero(np.r_[True, row[1:] != row[:-1], True]))
        shares[i] = (counts * (counts - 1)).sum() / (batch * (batch - 1))
    return shares


def at_hand(read: ShardIds, shards: int) -> int:
    """The most shards that are begun and not used up at a time, taking the epoch as a circle."""
    n = len(read)
    by_shard = np.lexsort((np.arange(n), read))
    change = np.zeros(n + 1, dtype=np.int64)
    for places in np.split(by_shard, np.searchsorted(read[by_shard], np.arange(1, shards))):
        gap = int(np.diff(places, append=places[0] + n).argmax())
        last, first = places[gap], places[(gap + 1) % len(places)]
        change[first] += 1
        change[last + 1] -= 1
        change[0] += first > last
    return int(change.cumsum().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=1282)
    parser.add_argument("--samples", type=int, default=1000, help="in a shard")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch and fewer windows")
    args = parser.parse_args()
    epochs = range(1 if args.quick else 3)
    windows = [w for w in ((64,) if args.quick else WINDOWS) if w < args.shards]
    shard_of = np.repeat(np.arange(args.shards), args.samples)
    uniform = (args.samples - 1) / (len(shard_of) - 1)
    result: dict[str, Any] = {}
    print(
        f"{args.shards} shards of {args.samples}, batches of {args.batch}\n"
        f"{'order':<12} {'same shard':>11} {'worst':>8} {'shards':>7}"
    )

    def show(name: str, reads: list[ShardIds], hand: int) -> None:
        shares = [same_shard(read, args.batch) for read in reads]
        mean, worst = float(np.concatenate(shares).mean()), 0.0
        for each in shares:
            stretch = min(len(each), max(20, len(each) // 100))
            smooth = np.convolve(each, np.full(stretch, 1 / stretch), "valid")
            worst = max(worst, float(smooth.max()))
        print(f"{name:<12} {mean / uniform:>10.2f}x {worst / uniform:>7.2f}x {hand:>7}", flush=True)
        key = name.replace(" ", "_")
        result[key] = round(mean / uniform, 3)
        result[f"{key}_worst"] = round(worst / uniform, 3)
        result[f"{key}_shards"] = hand

    full = FullPermutation(len(shard_of), args.seed)
    show("full", [shard_of[full.epoch(e).index] for e in epochs], args.shards)
    for window in windows:
        order = WindowedPermutation(shard_of, window, args.seed)
        reads = [shard_of[order.epoch(e).index] for e in epochs]
        show(f"window {window}", reads, at_hand(reads[0], args.shards) + 1)
        reads = [blocks(args.shards, args.samples, window, args.seed, e) for e in epochs]
        show(f"blocks {window}", reads, at_hand(reads[0], args.shards) + window)
    workers = 2 if args.quick else WORKERS
    reads = [
        read for e in epochs for read in streams(args.shards, args.samples, args.seed, e, workers)
    ]
    show("webdataset", reads, 2 * WORKERS)
    sizes = {"shards": args.shards, "samples_per_shard": args.samples, "batch": args.batch}
    print(json.dumps(result | sizes | {"epochs": len(epochs), "seed": args.seed}))


if __name__ == "__main__":
    main()
