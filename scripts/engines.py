"""Every engine in every precision against DDP in fp32 on one process: a table after 20 steps.

``make engines``. The network is small (a stem and two residual blocks), because CPUs emulate half
floats; everything else is a whole run: reader, augmentation, ShuffleBN, queue, engine, checkpoint.

A row's errors are relative: the largest of the 20 losses, and the distance of all weights of the
query encoder, of the key encoder, and of the queue from the reference's, over the reference's
length. Bounds:

- fp32: 1e-4. Sums are taken in another order, nothing else differs.
- bf16 and fp16: a unit in the last place is u = 2^-8 or 2^-11. A feature passes L = 8 layers, whose
  roundings add like a random walk, and a logit divides it by T: losses and features agree to
  u sqrt(L) / T. A gradient passes all layers twice more: how far the weights moved agrees to
  3 u sqrt(L) / T, and the weights themselves to that times the share that they moved.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from moco_scale import checkpoint, config, distributed
from moco_scale.batchnorm import GroupedBatchNorm2d
from moco_scale.cli import leave, run_command
from moco_scale.demo.pictures import write_folder
from moco_scale.encoders import Encoder
from moco_scale.pretrain import Pretraining

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
STEPS, TEMPERATURE, LAYERS = 20, 0.2, 8
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
FLAGS = (
    *("--recipe", "v2", "--dataset", "images", "--image-size", "24", "--batch-size", "16"),
    *("--bn-group-size", "4", "--nce-k", "96", "--nce-t", str(TEMPERATURE), "--epochs", "10"),
    *("--base-lr", "0.5", "--alpha", "0.9", "--num-workers", "0", "--knn-freq", "0"),
    *("--max-steps", str(STEPS), "--print-freq", "1", "--aug", "null", "--dim", "16"),
)


def small_encoder(settings: config.Config) -> Encoder:
    """A network that takes milliseconds, also in emulated half floats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.optim.rng_seed)
        stem = (nn.Conv2d(3, 16, 3, stride=2, bias=False), GroupedBatchNorm2d(16), nn.ReLU())
        blocks = [BasicBlock(16, 16, norm_layer=GroupedBatchNorm2d) for _ in range(2)]
        backbone = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(backbone, nn.Linear(16, settings.model.dim), 16)


class SmallPretraining(Pretraining):
    """A whole run of the small network."""

    def initial_encoder(self) -> Encoder:
        return small_encoder(self.config)


def worker(arguments: list[str]) -> None:
    """One rank of one cell."""

    def train() -> None:
        settings = config.parse(arguments)
        distributed.initialize(settings.run.device)
        SmallPretraining(settings).run()
        distributed.shutdown()

    leave(run_command("engines.py", train))


def run(engine: str, precision: str, world: int, shards: Path, out: Path) -> dict[str, Tensor]:
    """One cell: losses [20], and the weights and queue of its checkpoint."""
    flags = [*FLAGS, "--precision", precision, "--data-dir", str(shards), "--output-dir", str(out)]
    if engine.startswith("zero"):
        flags += ["--deepspeed", str(ROOT / "ds_configs" / f"{engine}.json")]
    else:
        flags += ["--engine", engine]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", str(world), __file__, "--worker", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} {precision} on {world}:\n{done.stdout}\n{done.stderr}")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    losses = torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)
    saved = checkpoint.load(out / "checkpoints" / f"step-{STEPS:08d}")
    return {"losses": losses, **saved}


def together(saved: dict[str, Tensor], prefix: str) -> Tensor:
    """All trained numbers of a part in one vector, fp64."""
    names = [n for n in sorted(saved) if n.startswith(prefix) and "running" not in n]
    return torch.cat([saved[n].double().flatten() for n in names if saved[n].is_floating_point()])


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    result = {"loss": float(((got["losses"] - wanted["losses"]) / wanted["losses"]).abs().max())}
    for name, prefix in (("query", "model.query."), ("key", "model.key."), ("queue", "queue.keys")):
        mine, theirs = together(got, prefix), together(wanted, prefix)
        result[name] = float((mine - theirs).norm() / theirs.norm())
    return result


def bounds(precision: str, wanted: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    if precision == "fp32":
        return dict.fromkeys(("loss", "query", "key", "queue"), 1e-4)
    feature = UNIT[precision] * math.sqrt(LAYERS) / TEMPERATURE
    result = {"loss": feature, "queue": feature}
    for name in ("query", "key"):
        last, first = (together(s, f"model.{name}.") for s in (wanted, start))
        result[name] = 3 * feature * float((last - first).norm() / last.norm())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Engines and precisions against fp32 DDP.")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="processes")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "pictures", train_per_class=8, val_per_class=1, size=48)
        shard = [sys.executable, "-m", "moco_scale", "shard", "--source", str(root / "pictures")]
        subprocess.run(
            [*shard, "--out", str(root / "shards")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        wanted = run("ddp", "fp32", 1, root / "shards", root / "reference")
        encoder = small_encoder(config.parse(list(FLAGS)))
        state = {n: t.detach() for n, t in encoder.state_dict().items()}
        start = {f"model.{e}.{n}": t for e in ("query", "key") for n, t in state.items()}
        print(
            "relative errors after 20 steps, each with its bound; reference: DDP, fp32, 1 process"
        )
        columns = ("loss", "query", "key", "queue")
        print(f"{'engine':8}{'precision':11}{'ranks':7}" + "".join(f"{c:22}" for c in columns))
        for precision in ("fp32", "bf16", "fp16"):
            limit = bounds(precision, wanted, start)
            for engine in ENGINES:
                for world in args.worlds:
                    out = root / f"{engine}-{precision}-{world}"
                    found = errors(run(engine, precision, world, root / "shards", out), wanted)
                    good = all(found[c] <= limit[c] for c in columns)
                    failed += not good
                    cells = "".join(f"{f'{found[c]:.1e} <= {limit[c]:.1e}':22}" for c in columns)
                    mark = "" if good else "TOO LARGE"
                    print(f"{engine:8}{precision:11}{world:<7}{cells}{mark}", flush=True)
    if failed:
        raise SystemExit(f"{failed} cells are off by more than rounding explains")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
