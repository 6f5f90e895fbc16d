"""Cost of the engine layer: a step under ``--engine ddp`` against the same step by hand.

    python benchmarks/engine.py [--quick] [--ranks 2] [--size 64] [--batch 8] [--repeats N]

The second is what one would write without an engine: DistributedDataParallel around the query
encoder, SGD, ``backward``, ``step``, and a fused moving average. Both train a ResNet-18 of the same
initial weights on the same images, with the same loss and the same all-gather of keys, and
alternate step by step in the same processes. Neither reads images from disk nor augments them.
Losses must agree, which is checked.

Prints a table of medians and, as its last line, one JSON object:

    engine_ms, by_hand_ms     median time of a step, milliseconds
    engine_vs_by_hand         median of the ratios of neighbouring steps, first over second
    ranks, batch_per_rank, image_size, repeats, torch
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moco_scale.distributed import collectives
from moco_scale.distributed.spawn import run_ranks
from moco_scale.engines.base import EngineSettings
from moco_scale.engines.ddp import DDPEngine
from moco_scale.methods.infonce import Negatives, infonce
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import build_encoder
from moco_scale.observe.finite import FiniteWatch

RATE, MOMENTUM, DECAY, ALPHA, T, QUEUE = 0.03, 0.9, 1e-4, 0.999, 0.2, 4096
WARM_UP = 3


def measure(batch: int, size: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each step under the engine and by hand."""
    generator = torch.Generator().manual_seed(collectives.rank())
    views = torch.randn(2, batch, 3, size, size, generator=generator)
    views = views.contiguous()
    queue = F.normalize(torch.randn(QUEUE, 128, generator=generator), dim=1)
    mine = slice(collectives.rank() * batch, (collectives.rank() + 1) * batch)
    start = build_encoder("resnet18")

    engine = DDPEngine(
        MoCo(copy.deepcopy(start)), EngineSettings(MOMENTUM, DECAY), torch.device("cpu")
    )
    engine.moco.train()
    watch = FiniteWatch(3, collectives.rank(), lambda: "none")

    def under_engine(step: int) -> Tensor:
        (query,) = engine.query(views[0])
        keys = collectives.all_gather_rows(engine.key(views[1]))
        loss = infonce(query, keys[mine], Negatives(queue), T).loss.mean()
        engine.backward(loss)
        if engine.step(RATE):
            engine.ema(ALPHA)
        watch.record(step, loss, engine.weights_finite(), skipped=False)
        watch.code()
        return loss

    query_encoder, key_encoder = copy.deepcopy(start), copy.deepcopy(start).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = (
            DistributedDataParallel(
                query_encoder, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            if collectives.world_size() > 1
            else query_encoder
        )
    sgd = torch.optim.SGD(
        query_encoder.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
    )
    weights = [w.detach() for w in query_encoder.parameters()]
    averages = [w.detach() for w in key_encoder.parameters()]

    def by_hand(step: int) -> Tensor:
        query = F.normalize(wrapped(views[0]), dim=1)
        with torch.no_grad():
            key = F.normalize(key_encoder(views[1]), dim=1)
            keys = collectives.all_gather_rows(key)
        loss = infonce(query, keys[mine], Negatives(queue), T).loss.mean()
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - ALPHA)
        return loss

    times: dict[Callable[[int], Tensor], list[float]] = {under_engine: [], by_hand: []}
    for step in range(WARM_UP + repeats):
        losses = []
        # Neither always follows the other.
        for way in (under_engine, by_hand) if step % 2 else (by_hand, under_engine):
            collectives.barrier()
            begin = time.perf_counter()
            losses.append(way(step).item())
            collectives.barrier()  # the slowest rank decides
            if step >= WARM_UP:
                times[way].append(time.perf_counter() - begin)
        if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
            raise AssertionError(f"the two ways differ at step {step}: {losses}")
    return times[under_engine], times[by_hand]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--batch", type=int, default=16, help="images of each rank")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--repeats", type=int, help="timed steps (default 100, --quick 20)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    repeats = args.repeats or (20 if args.quick else 100)
    engine, by_hand = run_ranks(measure, args.ranks, args.batch, args.size, repeats)[0]
    ratio = statistics.median(e / h for e, h in zip(engine, by_hand, strict=True))
    result = {
        "engine_ms": round(statistics.median(engine) * 1e3, 2),
        "by_hand_ms": round(statistics.median(by_hand) * 1e3, 2),
        "engine_vs_by_hand": round(ratio, 4),
        "ranks": args.ranks,
        "batch_per_rank": args.batch,
        "image_size": args.size,
        "repeats": repeats,
        "torch": torch.__version__,
    }
    print(
        f"ResNet-18, {args.ranks} ranks of {args.batch} images of 3x{args.size}x{args.size}, "
        f"median of {repeats} steps\n"
        f"engine {result['engine_ms']:.2f} ms, by hand {result['by_hand_ms']:.2f} ms, "
        f"ratio {ratio:.4f}"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
