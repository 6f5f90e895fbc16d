"""fp16's overflow and --compile: ``python scripts/gpu_check/half.py [--device cuda] [--tiny]``.

- overflow: a run in fp16 whose loss scale starts far too high leaves out steps, with no weight
  moved, until the scale fits, and then trains.
- compile: queries of compiled blocks against those of the same blocks uncompiled, in each
  precision; the distance of unit vectors, which must be below a few units in the last place of
  what the blocks compute in. Seconds that compiling took.

The last line is one JSON object: ``skipped`` steps, the ``scale`` that fits, ``PRECISION_compiled``
distances, ``PRECISION_compile_s`` seconds. Exit status 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from moco_scale.distributed import collectives
from moco_scale.engines.base import EngineSettings
from moco_scale.engines.ddp import DDPEngine
from moco_scale.methods.infonce import Negatives, infonce
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.optim.loss_scale import LossScaling

BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}


def engine_of(start: MoCo, **settings: Any) -> DDPEngine:
    engine = DDPEngine(copy.deepcopy(start), EngineSettings(0.9, 1e-4, **settings), DEVICE)
    engine.moco.train()
    return engine


def recovers(start: MoCo, views: Tensor) -> dict[str, Any]:
    engine = engine_of(start, precision="fp16", scaling=LossScaling(initial=2.0**40))
    queue = torch.nn.functional.normalize(torch.randn(256, 128, device=DEVICE), dim=1)
    scale = engine.loss_scale
    assert scale is not None
    applied = False
    for _ in range(40):
        before = [w.detach().clone() for w in engine.moco.query.parameters()]
        (query,) = engine.query(views[0])
        engine.backward(infonce(query, engine.key(views[1]), Negatives(queue), 0.2).loss.mean())
        applied = engine.step(0.01)
        same = all(map(torch.equal, before, engine.moco.query.parameters()))
        if same == applied or not engine.weights_finite():
            raise SystemExit("a step that was left out moved weights, or one that was not did not")
        if applied:
            break
    if not applied or not scale.skipped:
        raise SystemExit(f"{scale.skipped} steps were left out, and the last one too: {applied}")
    return {"skipped": scale.skipped, "scale": scale.value}


def compiled(start: MoCo, views: Tensor, precision: str) -> dict[str, float]:
    with torch.no_grad():
        (wanted,) = engine_of(start, precision=precision).query(views[0])
    engine = engine_of(start, precision=precision, compile=True)
    begin = time.monotonic()
    (got,) = engine.query(views[0])
    got.sum().backward()
    seconds = time.monotonic() - begin
    distance = float((got - wanted).norm(dim=1).max())
    return {f"{precision}_compiled": distance, f"{precision}_compile_s": round(seconds, 1)}


def tiny_encoder() -> Encoder:
    """A network whose half floats a CPU can emulate in moments."""
    layers = (nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return Encoder(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 128), 8
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a tiny network, nothing is compiled")
    args = parser.parse_args()
    collectives.initialize(args.device)
    global DEVICE
    DEVICE = collectives.device()
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    generator = torch.Generator().manual_seed(0)
    batch, size = (4, 16) if args.tiny else (32, 224)
    views = torch.randn(2, batch, 3, size, size, generator=generator).to(DEVICE)
    start = MoCo(tiny_encoder() if args.tiny else build_encoder("resnet50")).to(DEVICE)
    result = recovers(start, views)
    print(f"fp16 left out {result['skipped']} steps and trains at a scale of {result['scale']}")
    wrong = []
    for precision in () if args.tiny else BOUNDS:
        found = compiled(start, views, precision)
        result |= found
        distance = found[f"{precision}_compiled"]
        print(f"{precision}: compiled queries are {distance:.1e} from the others", flush=True)
        if not distance < BOUNDS[precision]:
            wrong.append(precision)
    print(json.dumps(result))
    collectives.shutdown()
    if wrong:
        sys.exit(f"compiled blocks differ too much in {', '.join(wrong)}")


DEVICE = torch.device("cpu")

if __name__ == "__main__":
    main()
