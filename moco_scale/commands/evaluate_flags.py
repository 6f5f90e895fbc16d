"""The options of an evaluation, and its command line, which is made from them."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from moco_scale.config import options, settings_file
from moco_scale.config.command_line import add_older_flags, precision_asked
from moco_scale.config.options import NOT_NEGATIVE, POSITIVE, option
from moco_scale.config.schema import DATASETS, RunConfig
from moco_scale.data.loading.bad_samples import POLICIES
from moco_scale.data.remote.shard_source import CACHE_GB, GIVE_UP_SECONDS, ShardSource
from moco_scale.engines.base import PRECISIONS
from moco_scale.evaluation.features import WHICH
from moco_scale.evaluation.linear_config import LinearConfig
from moco_scale.models.registry import MODELS
from moco_scale.utils.log import LEVELS, show_from


@dataclass(frozen=True)
class KnnConfig:
    """The vote of the nearest training images."""

    knn_k: int = option(200, "neighbours that vote", within=POSITIVE)
    knn_t: float = option(0.1, "temperature of the votes", within=POSITIVE)
    knn_bank: int = option(0, "training images used; 0: all", within=NOT_NEGATIVE)


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation."""

    data_dir: str = option(
        "",
        "shards with the splits train and val: folder or address",
        metavar="DIR",
        required=True,
    )
    shard_cache: str = option(
        "", "folder that fetched shards are kept in (default: in ~/.cache)", metavar="DIR"
    )
    shard_cache_size: float = option(CACHE_GB, "of that folder, in GB", within=POSITIVE)
    shard_timeout: float = option(
        GIVE_UP_SECONDS,
        "seconds without anything new after which a shard is given up",
        within=POSITIVE,
    )
    pretrained_model: str = option("", "a run's current.pth", metavar="FILE", required=True)
    output_dir: str = option("", "where results.json goes", metavar="DIR", required=True)
    protocol: str = option(
        "linear", "train a classifier, or a vote of the nearest", choices=("linear", "knn")
    )
    features: str = option("features", "backbone's or head's output", choices=WHICH)
    encoder: str = option("query", "key: the moving average", choices=("query", "key"))
    dataset: str = option("", "statistics and sizes; default: the run's", choices=tuple(DATASETS))
    image_size: int = option(0, "side of a crop in pixels; default: the run's", within=POSITIVE)
    batch_size: int = option(
        256,
        "GLOBAL batch: images at a time over all processes",
        aliases=("--total-batch-size",),
        within=POSITIVE,
    )
    model: str = option(
        "",
        "what --pretrained-model says anyway: must agree with it",
        choices=MODELS,
        metavar="NAME",
    )
    model_width: int = option(0, "likewise (default: the model's)", within=POSITIVE)
    num_workers: int = option(4, "decoders a process", within=NOT_NEGATIVE)
    bad_samples: str = option(
        "error",
        "skip: images that cannot be decoded are left out, counted, and said to be",
        choices=POLICIES,
    )
    precision: str = option("fp32", "of the encoder", choices=tuple(PRECISIONS))
    device: str = option("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    rng_seed: int = option(0, "order, crops, initial weights", within=NOT_NEGATIVE)
    hang_timeout: float = option(
        RunConfig.hang_timeout,
        "seconds within which a process that is lost is named and all end; 0: never",
        within=NOT_NEGATIVE,
    )
    log_level: str = option(
        "info", "messages that are shown: of this importance, or more", choices=LEVELS
    )
    resume: str = option(
        "auto",
        "of --protocol linear: go on where a run into the same folder stopped, or begin again",
        choices=("auto", "none"),
    )
    print_freq: int = option(100, "of --protocol linear: steps between lines", within=POSITIVE)
    knn: KnnConfig = field(default_factory=KnnConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)

    @property
    def source(self) -> ShardSource:
        """The data set, and how it is reached."""
        return ShardSource(
            self.data_dir,
            cache_dir=self.shard_cache,
            cache_size=self.shard_cache_size,
            give_up=self.shard_timeout,
        )

    def flat(self) -> dict[str, Any]:
        """Every value by flag name (underscores)."""
        return {
            options.flag_of(one).removeprefix("--").replace("-", "_"): getattr(part, one.name)
            for part in (self, self.knn, self.linear)
            for one in options.options_of(part)
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per option."""
    parser.usage = (
        f"{parser.prog} --data-dir DIR\n           --pretrained-model FILE --output-dir DIR [flags]"
    )
    settings_file.add_flag(parser, EvalConfig, KnnConfig, LinearConfig)
    options.add_flags(parser, EvalConfig)
    add_older_flags(parser)
    options.add_flags(parser.add_argument_group("--protocol knn"), KnnConfig)
    options.add_flags(parser.add_argument_group("--protocol linear"), LinearConfig)


def config_of(args: argparse.Namespace) -> EvalConfig:
    """Make the options of parsed flags, and show messages as they say.

    Raises:
        UserError: Flags that contradict each other, or values that cannot work.
    """
    flags = vars(args)
    flags["precision"] = precision_asked(flags)
    config = EvalConfig(**options.given(flags, EvalConfig))
    linear = LinearConfig(
        batch_size=config.batch_size,
        features=config.features,
        seed=config.rng_seed,
        **options.given(flags, LinearConfig),
    )
    knn = KnnConfig(**options.given(flags, KnnConfig))
    config = dataclasses.replace(config, knn=knn, linear=linear)
    options.refuse(options.out_of_range(config, config.knn, config.linear))
    show_from(config.log_level)
    return config
