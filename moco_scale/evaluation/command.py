"""``eval.py``: what a pretrained encoder is worth."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from moco_scale import distributed, identity, numerics, together
from moco_scale.argument_types import (
    not_negative,
    not_negative_int,
    positive,
    positive_int,
    whole_numbers,
)
from moco_scale.command_line import AMP_LEVELS, precision_of_amp
from moco_scale.config import DATASETS, RunConfig
from moco_scale.data.augment import AUGMENTATIONS
from moco_scale.data.bad_samples import POLICIES
from moco_scale.data.open_shards import has_split, open_shards
from moco_scale.data.shard_set import Shards
from moco_scale.data.shard_source import CACHE_GB, GIVE_UP_SECONDS, ShardSource
from moco_scale.encoders import MODELS
from moco_scale.errors import UserError
from moco_scale.evaluation import linear
from moco_scale.evaluation.features import WHICH, LeftOut, Pixels, Pretrained, load_pretrained
from moco_scale.evaluation.knn import KnnMonitor, bank_and_queries
from moco_scale.evaluation.linear_config import SCHEDULES, LinearConfig
from moco_scale.files import read_json, write_atomically
from moco_scale.older_flags import EVALUATION as OLDER_FLAGS
from moco_scale.older_flags import HintingParser
from moco_scale.timing import EVALUATION, Phases
from moco_scale.watchdog import Watch

RESULTS = "results.json"
KNN_K, KNN_T = 200, 0.1
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``eval.py``."""
    parser = HintingParser(
        "eval.py",
        description="Evaluate a pretrained encoder: linear classification or kNN.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.older = OLDER_FLAGS
    add = parser.add_argument
    add("--data-dir", required=True, help="shards with the splits train and val: folder or address")
    add("--shard-cache", default="", help="folder that fetched shards are kept in")
    add("--shard-cache-size", type=positive, default=CACHE_GB, help="of that folder, in GB")
    add(
        "--shard-timeout",
        type=positive,
        default=GIVE_UP_SECONDS,
        help="seconds without anything new after which a shard is given up",
    )
    add(
        "--allow-pipe",
        action="store_true",
        help="--data-dir may be 'pipe:COMMAND', run in a shell for every file; {} is its name",
    )
    add("--pretrained-model", required=True, help="a run's current.pth")
    add("--output-dir", required=True, help="where results.json goes")
    add("--protocol", choices=("linear", "knn"), default="linear", help="what to do")
    add("--features", choices=WHICH, default="features", help="backbone's or head's output")
    add("--encoder", choices=("query", "key"), default="query", help="key: the moving average")
    add("--dataset", choices=tuple(DATASETS), help="statistics and sizes; default: the run's")
    add("--image-size", type=positive_int, help="side of a crop in pixels; default: the run's")
    add("--batch-size", "--total-batch-size", type=positive_int, default=256, help="GLOBAL batch")
    add("--model", choices=MODELS, help="what --pretrained-model says anyway: must agree with it")
    add("--model-width", type=positive_int, help="likewise")
    add("--num-workers", type=not_negative_int, default=4, help="decoders a process")
    add(
        "--bad-samples",
        choices=POLICIES,
        default="error",
        help="skip: pictures that cannot be decoded are left out, counted, and said to be",
    )
    add("--precision", choices=tuple(_DTYPES), help="of the encoder; default: fp32")
    add("--amp-opt-level", choices=AMP_LEVELS, help="older name: O0 is fp32, the others fp16")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    add("--rng-seed", type=not_negative_int, default=0, help="order, crops, initial weights")
    add(
        "--hang-timeout",
        type=not_negative,
        default=RunConfig.hang_timeout,
        help="seconds within which a process that is lost is named and all end; 0: never",
    )
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    knn = parser.add_argument_group("--protocol knn")
    knn.add_argument("--knn-k", type=positive_int, default=KNN_K, help="neighbours that vote")
    knn.add_argument("--knn-t", type=positive, default=KNN_T, help="temperature of the votes")
    knn.add_argument(
        "--knn-bank", type=not_negative_int, default=0, help="training pictures used; 0: all"
    )

    group = parser.add_argument_group("--protocol linear")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="official",
        help="official: x0.1 after 60%% and 80%% of the epochs; bl0: warm-up, cosine",
    )
    group.add_argument("--epochs", type=positive_int, default=100, help="passes over train")
    group.add_argument(
        "--lr", "--learning-rate", type=positive, default=30.0, help="for this batch, unscaled"
    )
    group.add_argument("--weight-decay", type=not_negative, default=0.0, help="of the classifier")
    group.add_argument("--momentum", type=not_negative, default=0.9, help="of SGD")
    group.add_argument(
        "--aug",
        type=str.lower,
        choices=tuple(AUGMENTATIONS),
        default="linear",
        help="of training pictures",
    )
    group.add_argument(
        "--crop", type=_share, help="smallest share of the area a crop takes; default: --aug's"
    )
    group.add_argument(
        "--lr-scheduler", choices=("step", "cosine"), help="default: --schedule's, as the next two"
    )
    group.add_argument("--warmup-epoch", type=not_negative_int, help="epochs of linear warm-up")
    group.add_argument(
        "--lr-decay-epochs", nargs="+", type=whole_numbers, metavar="N", help="of 'step'"
    )
    group.add_argument("--lr-decay-rate", type=positive, default=0.1, help="of each of these")
    group.add_argument(
        "--cache-features",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="encode centre crops once and train on these: quick, not the published protocol",
    )
    group.add_argument("--resume", choices=("auto", "none"), default="auto", help="after a stop")
    group.add_argument("--print-freq", type=positive_int, default=100, help="steps between lines")
    return parser


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and at most 1")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says.

    Raises:
        UserError: something does not fit; every rank raises it.
    """
    args = make_parser().parse_args(argv)
    if args.amp_opt_level is not None:
        args.precision = precision_of_amp(args.amp_opt_level, args.precision)
    args.precision = args.precision or "fp32"
    distributed.initialize(args.device, hang_timeout=args.hang_timeout)
    numerics.set_switches()
    phases = Phases()
    phases.enter(EVALUATION)
    with (
        Watch(phases, args.hang_timeout, Path(args.output_dir), "eval.py"),
        _encoding_is_progress(phases),
    ):
        installation = identity.installation(distributed.device())
        identity.require_alike(installation | identity.of_flags(vars(args)))
        evaluate(args, phases.alive)
    distributed.shutdown()


@contextlib.contextmanager
def _encoding_is_progress(phases: Phases) -> Iterator[None]:
    """Within, every batch that a module computes is a sign that this process gets on."""
    handle = register_module_forward_pre_hook(lambda *_: phases.alive())
    try:
        yield
    finally:
        handle.remove()


def evaluate(args: argparse.Namespace, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One evaluation; every rank calls it.

    Args:
        args: of the command line.
        alive: called now and then while some rank makes an index, which may take hours.

    Returns:
        What went to ``results.json`` for this evaluation: ``top1`` and ``top5`` in percent,
        ``protocol``, the encoder's file, epoch and step, and the settings.

    Raises:
        UserError: something does not fit; every rank raises it.
    """
    started = time.monotonic()
    folder = Path(args.output_dir)
    # Which may index them.
    together.in_turn(partial(open_shards, _source(args), "train"), alive)
    failure: UserError | None = None
    try:
        earlier = _prepare(folder) if distributed.is_main() else {}
        pretrained = load_pretrained(args.pretrained_model, args.encoder)
        _require_agreement(args, pretrained)
        task = _knn(args, pretrained) if args.protocol == "knn" else None
        pair = None if task else _splits(_source(args))
    except UserError as error:
        failure = error
    failure = together.first_error(failure)
    if failure is not None:
        raise failure
    weights = {"weights in --pretrained-model": pretrained.fingerprint}
    identity.require_alike(weights, "give all of them the same file")
    if distributed.is_main():
        print(
            f"{args.protocol} evaluation of the {args.encoder} encoder in {pretrained.path} "
            f"(epoch {pretrained.epoch}, step {pretrained.step}), "
            f"{distributed.world_size()} process(es) on {distributed.device().type}",
            file=sys.stderr,
            flush=True,
        )
    if task is not None:
        measured = _run_knn(args, task, pretrained)
    else:
        assert pair is not None
        measured = _run_linear(args, pretrained, *pair, folder)
    result = {
        **{key: measured.pop(key) for key in ("top1", "top5")},
        "protocol": args.protocol,
        **measured,
        "pretrained_model": str(pretrained.path),
        "encoder": args.encoder,
        "epoch": pretrained.epoch,
        "step": pretrained.step,
        "seconds": round(time.monotonic() - started, 1),
    }
    _finish(folder, earlier, result)
    return result


def _require_agreement(args: argparse.Namespace, pretrained: Pretrained) -> None:
    """What older command lines repeat has to be what the file says."""
    for name in ("model", "model_width"):
        given, held = getattr(args, name), pretrained.opt[name]
        if given is not None and given != held:
            raise UserError(
                f"--{name.replace('_', '-')} {given}, but {pretrained.path} holds a {held}; "
                "drop the flag: the file says what it needs"
            )


def _prepare(folder: Path) -> dict[str, Any]:
    """Make the folder, see that it can be written, and read the results it holds."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file; name a folder")
    probe = folder / ".written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output-dir {folder} cannot be written: {error.strerror}; "
            "choose another folder or fix its permissions"
        ) from None
    path = folder / RESULTS
    if not path.exists():
        return {}
    content = read_json(path, "--output-dir holds")
    earlier = content.get("all") if isinstance(content, dict) else None
    if not isinstance(earlier, dict):
        raise UserError(f"{path} is no result of eval.py; choose another --output-dir")
    return earlier


def _finish(folder: Path, earlier: dict[str, Any], result: dict[str, Any]) -> None:
    """``results.json``: this result, and under ``all`` the newest of every protocol."""
    failure = None
    if distributed.is_main():
        results = {**earlier, result["variant"]: result}
        try:
            text = json.dumps({**result, "all": results}, indent=1)
            write_atomically(folder / RESULTS, text + "\n")
        except OSError as error:
            failure = UserError(f"cannot write {folder / RESULTS}: {error.strerror}")
        else:
            best = f" (best epoch {result['best_epoch']})" if "best_epoch" in result else ""
            missing = sum(result.get("left_out", {}).values())
            without = f"; without {missing} pictures that cannot be decoded" if missing else ""
            last = f", last epoch {result['last_top1']:.2f} %" if "last_top1" in result else ""
            print(
                f"{result['variant']}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
                f"{best}{last}{without}; {folder / RESULTS}",
                flush=True,
            )
    failure = together.first_error(failure)
    if failure is not None:
        raise failure


def _pixels(args: argparse.Namespace, pretrained: Pretrained) -> Pixels:
    name = args.dataset or pretrained.opt.get("dataset")
    if name not in DATASETS:
        raise UserError(
            f"{pretrained.path} was trained on a data set {name!r} that is unknown here; "
            f"give --dataset, one of {', '.join(DATASETS)}"
        )
    preset = DATASETS[name]
    own = preset.image_size if args.dataset else pretrained.opt.get("image_size")
    size = args.image_size or own or preset.image_size
    return Pixels(int(size), preset.resize_ratio, preset.mean, preset.std)


def _source(args: argparse.Namespace) -> ShardSource:
    return ShardSource(
        args.data_dir,
        cache_dir=args.shard_cache,
        cache_size=args.shard_cache_size,
        give_up=args.shard_timeout,
        allow_pipe=args.allow_pipe,
    )


def _splits(source: ShardSource) -> tuple[Shards, Shards]:
    return open_shards(source, "train"), open_shards(source, "val")


def _knn(args: argparse.Namespace, pretrained: Pretrained) -> KnnMonitor:
    bank, queries = bank_and_queries(_source(args), max_bank=args.knn_bank, seed=args.rng_seed)
    return KnnMonitor(
        bank,
        queries,
        **vars(_pixels(args, pretrained)),
        k=args.knn_k,
        temperature=args.knn_t,
        batch_size=max(args.batch_size // distributed.world_size(), 1),
        num_workers=args.num_workers,
        autocast=_DTYPES[args.precision],
        label="encoding",
        left_out=LeftOut() if args.bad_samples == "skip" else None,
    )


def _run_knn(args: argparse.Namespace, task: KnnMonitor, pretrained: Pretrained) -> dict[str, Any]:
    encoder = pretrained.encoder.to(distributed.device())
    return {
        **task.measure(encoder, args.features),
        **_left_out(task.left_out),
        "variant": _knn_variant(args),
        "description": (
            f"weighted kNN of Wu et al. 2018 on the {_OUTPUTS[args.features]}, "
            f"k = {args.knn_k}, T = {args.knn_t:g}"
            + (
                ""
                if has_split(_source(args), "val")
                else "; no val split: a tenth of train held out"
            )
        ),
        "settings": {
            "data_dir": str(_source(args)),
            "bank": len(task.bank),
            "queries": len(task.queries),
            "k": args.knn_k,
            "temperature": args.knn_t,
            "features": args.features,
            "image_size": task.image_size,
            "precision": args.precision,
            "processes": distributed.world_size(),
        },
    }


def _knn_variant(args: argparse.Namespace) -> str:
    """Evaluations that differ in it can share a folder; the usual k and T are not named."""
    parts = ["knn", args.features]
    parts += ["key"] if args.encoder == "key" else []
    parts += [f"k{args.knn_k}"] if args.knn_k != KNN_K else []
    parts += [f"t{args.knn_t:g}"] if args.knn_t != KNN_T else []
    return "-".join(parts)


_OUTPUTS = {"features": "backbone's features", "projection": "head's output"}


def _left_out(left_out: LeftOut | None) -> dict[str, Any]:
    """How many pictures of each split could not be decoded, where that was no error."""
    return {} if left_out is None else {"left_out": dict(left_out.counts)}


def _run_linear(
    args: argparse.Namespace,
    pretrained: Pretrained,
    train: Shards,
    val: Shards,
    folder: Path,
) -> dict[str, Any]:
    config = LinearConfig(
        schedule=args.schedule,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        aug=args.aug,
        cache_features=args.cache_features,
        features=args.features,
        seed=args.rng_seed,
        scheduler=args.lr_scheduler or "",
        warmup_epochs=args.warmup_epoch,
        decay_epochs=tuple(n for part in args.lr_decay_epochs or () for n in part),
        decay_rate=args.lr_decay_rate,
        crop_min=args.crop or 0.0,
    )
    pixels = _pixels(args, pretrained)
    evaluation = linear.LinearEvaluation(
        pretrained,
        train,
        val,
        pixels,
        config,
        folder,
        resume=args.resume,
        num_workers=args.num_workers,
        autocast=_DTYPES[args.precision],
        print_freq=args.print_freq,
        bad_samples=args.bad_samples,
    )
    how = "random crops and flips" if config.aug == "linear" else f"augmentation {config.aug}"
    if config.cache_features:
        how = "centre crops encoded once (quick variant, not the published protocol)"
    return {
        **evaluation.run(),
        **_left_out(evaluation.left_out),
        "variant": evaluation.variant,
        "description": (
            f"linear classifier on the {_OUTPUTS[config.features]}, frozen, {how}, "
            f"schedule {config.schedule}, {config.epochs} epochs; top1 and top5 of the best epoch"
        ),
        "settings": {
            "data_dir": str(_source(args)),
            **{k: v for k, v in vars(config).items()},
            "image_size": pixels.image_size,
            "precision": args.precision,
            "processes": distributed.world_size(),
        },
    }
