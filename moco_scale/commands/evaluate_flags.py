"""The command line of ``eval.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moco_scale.config.command_line import AMP_LEVELS, precision_of_amp
from moco_scale.config.flag_types import (
    DefaultsHelpFormatter,
    not_negative,
    not_negative_int,
    positive,
    positive_int,
    whole_numbers,
)
from moco_scale.config.older_flags import EVALUATION, HintingParser
from moco_scale.config.schema import DATASETS, RunConfig
from moco_scale.data.images.augment import AUGMENTATIONS
from moco_scale.data.loading.bad_samples import POLICIES
from moco_scale.data.remote.shard_source import CACHE_GB, GIVE_UP_SECONDS
from moco_scale.engines.base import PRECISIONS
from moco_scale.evaluation.features import WHICH
from moco_scale.evaluation.linear_config import SCHEDULES
from moco_scale.models.registry import MODELS

KNN_K, KNN_T = 200, 0.1


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``eval.py``."""
    parser = HintingParser(
        prog="eval.py",
        older=EVALUATION,
        description="Evaluate a pretrained encoder: linear classification or kNN.",
        formatter_class=DefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data-dir", required=True, help="shards with the splits train and val: folder or address")
    add(
        "--shard-cache",
        default="",
        help="folder that fetched shards are kept in (default: in ~/.cache)",
    )
    add("--shard-cache-size", type=positive, default=CACHE_GB, help="of that folder, in GB")
    add(
        "--shard-timeout",
        type=positive,
        default=GIVE_UP_SECONDS,
        help="seconds without anything new after which a shard is given up",
    )
    add("--pretrained-model", required=True, help="a run's current.pth")
    add("--output-dir", required=True, help="where results.json goes")
    add(
        "--protocol",
        choices=("linear", "knn"),
        default="linear",
        help="train a classifier, or a vote of the nearest",
    )
    add("--features", choices=WHICH, default="features", help="backbone's or head's output")
    add("--encoder", choices=("query", "key"), default="query", help="key: the moving average")
    add("--dataset", choices=tuple(DATASETS), help="statistics and sizes; default: the run's")
    add("--image-size", type=positive_int, help="side of a crop in pixels; default: the run's")
    add(
        "--batch-size",
        "--total-batch-size",
        type=positive_int,
        default=256,
        help="GLOBAL batch: images at a time over all processes",
    )
    add("--model", choices=MODELS, help="what --pretrained-model says anyway: must agree with it")
    add("--model-width", type=positive_int, help="likewise")
    add("--num-workers", type=not_negative_int, default=4, help="decoders a process")
    add(
        "--bad-samples",
        choices=POLICIES,
        default="error",
        help="skip: images that cannot be decoded are left out, counted, and said to be",
    )
    add("--precision", choices=tuple(PRECISIONS), help="of the encoder; default: fp32")
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
        "--knn-bank", type=not_negative_int, default=0, help="training images used; 0: all"
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
        help="of training images",
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
    group.add_argument(
        "--resume",
        choices=("auto", "none"),
        default="auto",
        help="auto: go on where a run into the same folder stopped",
    )
    group.add_argument("--print-freq", type=positive_int, default=100, help="steps between lines")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; ``precision`` is what any of its flags says.

    Raises:
        UserError: flags that contradict each other.
    """
    args = make_parser().parse_args(argv)
    if args.amp_opt_level is not None:
        args.precision = precision_of_amp(args.amp_opt_level, args.precision)
    args.precision = args.precision or "fp32"
    return args


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and at most 1")
    return value
