"""Memory of a rank under every engine: what falls as ranks are added, and what does not.

    python benchmarks/memory.py [--quick] [--model vit_base] [--ranks 1 2 4] [--engines ...]

Each cell is a job of its own: the model is wrapped, one forward and backward pass is run, and the
bytes behind this rank's own tensors are added up, each piece of memory once. Images are small
(two patches a side): weights, gradients, optimizer state and key encoder do not depend on them, and
activations are not counted. The largest rank decides.

Prints a table in MiB and, as its last line, one JSON object. For each engine E and R ranks:

    E_weights_R, E_key_R, E_gradients_R, E_optimizer_R    bytes on the largest rank
    E_state_vs_one_rank_R     key and optimizer state together, over those of one rank under E
    model, parameters, torch
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch

from moco_scale.config import command_line
from moco_scale.distributed.spawn import run_ranks
from moco_scale.engines import make_engine
from moco_scale.engines.base import storage_bytes
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import set_groups
from moco_scale.models.encoder import build_encoder
from moco_scale.models.vit import VITS

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
KINDS = ("weights", "key", "gradients", "optimizer")
PER_RANK = 2


def measure(engine: str, model: str) -> dict[str, int]:
    """Bytes by kind on this rank, after a backward pass and before the step."""
    from moco_scale.distributed import collectives

    batch = PER_RANK * collectives.world_size()
    size = 2 * VITS[model].patch if model in VITS else 32
    flags = ["--dataset", "images", "--model", model, "--batch-size", str(batch)]
    flags += ["--bn-group-size", str(PER_RANK), "--image-size", str(size)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        if engine.startswith("zero"):
            content = {"gradient_clipping": 0, "zero_optimization": {"stage": int(engine[4:])}}
            json.dump(content, file)
            file.flush()
            flags += ["--deepspeed", file.name]
        else:
            flags += ["--engine", engine]
        settings = command_line.parse(flags)
        moco = MoCo(build_encoder(model, image_size=size))
        set_groups(moco, PER_RANK, batch)
        made = make_engine(settings, moco, torch.device("cpu"))
    made.moco.train()
    images = torch.randn(PER_RANK, 3, size, size)
    for last in (False, True):
        (query,) = made.query(images)
        made.backward(query[:, 0].mean())
        if not last:
            made.step(0.01)  # what is only there after a first step, is there
    return storage_bytes(made.storage())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="default vit_base, --quick vit_small")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default all; --quick two")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    model = args.model or ("vit_small" if args.quick else "vit_base")
    engines = args.engines or (("zero3", "fsdp") if args.quick else ENGINES)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in build_encoder(model).parameters())
    print(f"{model}, {numbers / 1e6:.1f} M parameters, fp32; MiB on the largest rank")
    print(
        f"{'engine':8}{'ranks':>6}" + "".join(f"{kind:>12}" for kind in KINDS) + "   key+optimizer"
    )
    result: dict[str, Any] = {}
    for engine in engines:
        alone = 0
        for world in args.ranks:
            found = run_ranks(measure, world, engine, model)
            largest = {kind: max(each[kind] for each in found) for kind in KINDS}
            state = largest["key"] + largest["optimizer"]
            alone = alone or state
            cells = "".join(f"{largest[kind] / 2**20:>12.1f}" for kind in KINDS)
            print(f"{engine:8}{world:>6}{cells}{state / alone:>16.3f}", flush=True)
            result |= {f"{engine}_{kind}_{world}": largest[kind] for kind in KINDS}
            result[f"{engine}_state_vs_one_rank_{world}"] = round(state / alone, 4)
    print(json.dumps(result | {"model": model, "parameters": numbers, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
