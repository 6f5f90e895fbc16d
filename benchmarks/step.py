"""A training step without the reading, beside its ceiling and beside the usual way to write it.

    python benchmarks/step.py [--quick] [--device cpu|cuda] [--precisions fp32 bf16 fp16]
                              [--compile] [--model resnet50] [--batch N] [--size S] [--profile]

Images are random bytes in (pinned) host memory; nothing is read from disk. In the same process
alternate:

- run: :func:`train_step` of recipe v2 with its inputs made one step ahead on a GPU:
  copy, ShuffleBN, augmentation, both encoders, loss, optimizer, moving average, queue;
- compiled: the same with ``--compile`` (where that is given);
- ceiling: what the encoders alone take: forward and backward of the query, forward of the key,
  images on the device already;
- plain: MoCo v2 as one would write it: torchvision's ResNet, DistributedDataParallel, normalised
  fp32 images from the host (their augmentation is free), ShuffleBN by gathering them, logits of
  size N x (1 + K) against a clone of the queue, autocast and GradScaler, cuDNN's fastest kernels
  instead of its reproducible ones. fp32 is fp32 here too, without TF32.

Prints a table of medians and, as its last line, one JSON object. For each PRECISION and WAY:

    PRECISION_WAY                 images per second
    PRECISION_WAY_gib             most memory allocated on a GPU while it ran, in GiB
    PRECISION_run_vs_ceiling      median of the repeats' ratios of images per second; compiled too
    PRECISION_run_vs_plain        likewise
    device, model, batch, size, keys, steps (of a repeat), repeats, torch

``--profile`` prints where the time of three steps goes, by operation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_scale.commands import shard
from moco_scale.config.resolve import build
from moco_scale.config.schema import Config
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.demo.render import CLASSES, write_folder
from moco_scale.distributed import collectives
from moco_scale.engines import make_engine
from moco_scale.engines.base import PRECISIONS
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import set_groups
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

Step = Callable[[], Any]


def make_shards(root: Path, images: int) -> Path:
    """Shards of rendered images: a run wants to know how many there are."""
    write_folder(root / "images", train_per_class=-(-images // len(CLASSES)), val_per_class=1)
    parser = argparse.ArgumentParser()
    shard.add_arguments(parser)
    shard.run(parser.parse_args(["--source", str(root / "images"), "--out", str(root / "shards")]))
    return root / "shards"


def batches(run: Run) -> Iterator[ViewBatch]:
    """Batches of the plan, of random bytes."""
    optim, size = run.config.optim, run.config.data.image_size
    shape = (2, optim.batch_size // run.world, 3, size, size)
    generator = torch.Generator().manual_seed(run.rank)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if run.device.type == "cuda":
        views = views.pin_memory()
    for step in range(run.total_steps):
        share = run.plan.share(step, run.rank, run.world)
        index, passes = (torch.tensor(column) for column in share)
        yield ViewBatch(step, run.plan.epoch_of(step), index, passes, index, views)


def run_step(config: Config) -> Step:
    run = Run(config)
    run.engine.moco.train()
    coming = run.inputs.ahead(batches(run))

    def step() -> None:
        train_step(run, next(coming))
        run.step += 1
        run.watch.judge(run.watch.code())

    return step


def ceiling_step(config: Config, device: torch.device) -> Step:
    run = Run(config)
    moco = MoCo(run.initial_encoder()).to(device)
    set_groups(moco, config.model.bn_group_size, config.optim.batch_size, 1)
    engine = make_engine(config, moco.train(), device)
    share, size = config.optim.batch_size // run.world, config.data.image_size
    images = torch.randn(2, share, 3, size, size, device=device)
    query, key = (view.contiguous(memory_format=torch.channels_last) for view in images)
    parameters = list(moco.query.parameters())

    def step() -> None:
        (features,) = engine.query(query)
        engine.backward((features * engine.key(key)).sum(1).mean())
        for parameter in parameters:
            parameter.grad = None

    return step


class Plain:
    """MoCo v2 as one would write it without this package; one process or several."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = PRECISIONS[config.run.precision]
        self.query, self.key = self._encoder(), self._encoder()
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        ids = [device.index] if device.type == "cuda" else None
        self.ddp = DistributedDataParallel(self.query, device_ids=ids)
        optim = config.optim
        self.sgd = torch.optim.SGD(
            self.query.parameters(),
            lr=config.learning_rate,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.queue = F.normalize(
            torch.randn(config.model.dim, config.contrast.nce_k, device=device), dim=0
        )
        self.pointer = 0
        size = config.data.image_size
        self.share = optim.batch_size // collectives.world_size()
        self.images = torch.randn(2, self.share, 3, size, size)
        if device.type == "cuda":
            self.images = self.images.pin_memory()

    def _encoder(self) -> nn.Module:
        model: Any = getattr(torchvision.models, self.config.model.model)()
        width = model.fc.in_features
        model.fc = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.config.model.dim)
        )
        moved: nn.Module = model.to(self.device)
        return moved

    def step(self) -> None:
        cudnn = torch.backends.cudnn
        cudnn.deterministic, cudnn.benchmark = False, True
        try:
            self._step()
        finally:
            cudnn.deterministic, cudnn.benchmark = True, False

    def _step(self) -> None:
        contrast = self.config.contrast
        query, key = self.images.to(self.device, non_blocking=True)
        with torch.autocast(
            self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None
        ):
            q = F.normalize(self.ddp(query), dim=1)
            with torch.no_grad():
                for ours, theirs in zip(
                    self.query.parameters(), self.key.parameters(), strict=True
                ):
                    theirs.mul_(contrast.alpha).add_(ours, alpha=1 - contrast.alpha)
                everyone = collectives.all_gather_rows(key)
                order = torch.randperm(len(everyone), device=self.device)
                collectives.broadcast_([order])
                mine = collectives.rank() * self.share
                k = F.normalize(self.key(everyone[order[mine : mine + self.share]]), dim=1)
                keys = collectives.all_gather_rows(k)[order.argsort()]
                k = keys[mine : mine + self.share]
            positive = torch.einsum("nc,nc->n", q, k)[:, None]
            negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
            logits = torch.cat([positive, negative], dim=1) / contrast.nce_t
            labels = torch.zeros(len(logits), dtype=torch.long, device=self.device)
            loss = F.cross_entropy(logits, labels)
        self.sgd.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.sgd)
        self.scaler.update()
        end = self.pointer + len(keys)
        self.queue[:, self.pointer : end] = keys.T
        self.pointer = end % contrast.nce_k


def settings(args: argparse.Namespace, root: Path, precision: str, compiled: bool) -> Config:
    out = root / f"{precision}-{time.monotonic_ns()}"
    flags: dict[str, Any] = {
        "dataset": "images",
        "data_dir": str(root / "shards"),
        "output_dir": str(out),
        "model": args.model,
        "image_size": args.size,
        "batch_size": args.batch,
        "nce_k": args.keys,
        "precision": precision,
        "compile": compiled,
        "knn_freq": 0,
        "epochs": 100_000,  # of a step or two: more than are measured
        "device": args.device,
    }
    return build("v2", flags)


def measure(
    steps: dict[str, Step], device: torch.device, count: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a step, by way and repeat; and the most memory while a way ran, GiB."""
    on_gpu = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in steps}
    memory = dict.fromkeys(steps, 0.0)
    for repeat in range(1 + repeats):  # the first gets ready
        for name in list(steps) if repeat % 2 else list(steps)[::-1]:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(count):
                steps[name]()
            if on_gpu:
                torch.cuda.synchronize()
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated() / 2**30)
            if repeat:
                times[name].append((time.perf_counter() - start) / count)
    return times, memory


def profiled(step: Step, device: torch.device) -> None:
    """Print where three steps spend their time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(3):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)
    print(table, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), help="default: all")
    parser.add_argument("--model", help="a ResNet (default: resnet50; on a CPU resnet18)")
    parser.add_argument("--batch", type=int, help="images (default: 256; on a CPU 16)")
    parser.add_argument("--size", type=int, help="their side (default: 224; on a CPU 64)")
    parser.add_argument("--keys", type=int, help="in the queue (default: 65536; on a CPU 4096)")
    parser.add_argument("--compile", action="store_true", help="the compiled run too")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--repeats", type=int, help="timed repeats (default 8, --quick 3)")
    parser.add_argument("--quick", action="store_true", help="under a minute; on a CPU only fp32")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = args.device == "cuda"
    args.precisions = args.precisions or (list(PRECISIONS) if on_gpu else ["fp32"])
    args.model = args.model or ("resnet50" if on_gpu else "resnet18")
    args.batch = args.batch or (256 if on_gpu else 16)
    args.size = args.size or (224 if on_gpu else 64)
    args.keys = args.keys or (65536 if on_gpu else 4096)
    count, repeats = (10 if on_gpu else 1), args.repeats or (3 if args.quick else 8)
    collectives.initialize(args.device)
    device = collectives.device()
    result: dict[str, Any] = {}
    print(f"{args.model}, {args.batch} images of {args.size}x{args.size} on {device}")
    print(f"{'':14}{'images/s':>10}{'GiB':>8}{'of ceiling':>12}{'of plain':>10}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_shards(Path(folder), args.batch)
        for precision in args.precisions:
            config = settings(args, Path(folder), precision, False)
            steps = {"run": run_step(config)}
            if args.compile:
                steps["compiled"] = run_step(settings(args, Path(folder), precision, True))
            other = settings(args, Path(folder), precision, False)
            steps |= {"ceiling": ceiling_step(other, device), "plain": Plain(config, device).step}
            times, memory = measure(steps, device, count, repeats)
            for name, spent in times.items():
                rate = args.batch / statistics.median(spent)
                ratios = {
                    base: statistics.median(b / a for a, b in zip(spent, times[base], strict=True))
                    for base in ("ceiling", "plain")
                }
                gib = f"{memory[name]:.2f}" if on_gpu else "-"
                print(
                    f"{precision:5}{name:9}{rate:>10.1f}{gib:>8}"
                    f"{ratios['ceiling']:>12.3f}{ratios['plain']:>10.3f}",
                    flush=True,
                )
                result[f"{precision}_{name}"] = round(rate, 1)
                if on_gpu:
                    result[f"{precision}_{name}_gib"] = round(memory[name], 2)
                if name in ("run", "compiled"):
                    for base, ratio in ratios.items():
                        result[f"{precision}_{name}_vs_{base}"] = round(ratio, 4)
            if args.profile:
                profiled(steps["compiled" if args.compile else "run"], device)
            del steps
            torch.compiler.reset()
    result |= {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "keys": args.keys,
        "steps": count,
        "repeats": repeats,
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    collectives.shutdown()


if __name__ == "__main__":
    main()
