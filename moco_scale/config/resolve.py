"""Complete configurations from recipes and flags, with their contradictions.

A value comes from, in this order: a flag, the recipe, the data set's preset, the field's default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

from moco_scale.config import deepspeed_file
from moco_scale.config.options import out_of_range, refuse
from moco_scale.config.recipes import RECIPES
from moco_scale.config.schema import SECTIONS, Config, OptimConfig, RunConfig
from moco_scale.data.sampling.windows import REMOTE_WINDOW
from moco_scale.data.shards.mixed_shards import split_mixture
from moco_scale.utils.errors import UserError


def build(recipe: str, given: dict[str, Any]) -> Config:
    """Build a complete, checked configuration from a recipe and values by field name.

    Raises:
        UserError: The recipe is unknown, or values contradict each other or cannot work.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r} is unknown; there are {', '.join(RECIPES)}")
    values = RECIPES[recipe].settings | given
    sections = {
        name: cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        for name, cls in SECTIONS.items()
    }
    config = _resolve(Config(recipe=recipe, **sections, given=frozenset(given)), given)
    _check(config)
    return config


def _resolve(config: Config, given: dict[str, Any]) -> Config:
    """Fill in values that follow from others."""
    preset, replace = config.preset, dataclasses.replace
    data, model, run = config.data, config.model, config.run
    # An empty --data-dir does not mean the default.
    data_dir = data.data_dir if "data_dir" in given else f"data/{data.dataset}"
    image_size = data.image_size or preset.image_size
    data = replace(data, data_dir=data_dir, image_size=image_size)
    remote = any(part.remote for part in split_mixture(data_dir))
    if "shuffle_window" not in given and remote:
        data = replace(data, shuffle_window=REMOTE_WINDOW)
    batch, group = config.optim.batch_size, model.bn_group_size or config.optim.batch_size
    if "bn_group_size" not in given and batch > 0 and group > 0 and batch % group:
        # The recipe's group cannot tile a batch chosen by hand: the largest that can, below it.
        group = next(g for g in range(min(group, batch), 0, -1) if batch % g == 0)
    model = replace(model, stem=model.stem or preset.stem, bn_group_size=group)
    optim = config.optim
    if "warmup_epoch" not in given and optim.warmup_epoch >= optim.epochs > 0:
        # The recipe's warm-up was made for its own length: keep its place in a much shorter run.
        optim = replace(optim, warmup_epoch=optim.epochs // 10)
    run = replace(
        run,
        engine=run.engine or ("deepspeed" if run.deepspeed else "ddp"),
        precision=run.precision or _precision_of_file(run.deepspeed),
    )
    if run.deepspeed:
        run, optim = _numbers_of_file(run, optim, given)
    run = replace(run, accumulation_steps=run.accumulation_steps or 1)
    return replace(config, data=data, model=model, optim=optim, run=run)


def _numbers_of_file(
    run: RunConfig, optim: OptimConfig, given: dict[str, Any]
) -> tuple[RunConfig, OptimConfig]:
    """Read numbers of the user's DeepSpeed file that no flag gives."""
    if "clip_grad" not in given:
        norm = deepspeed_file.requested_number(run.deepspeed, "gradient_clipping")
        optim = dataclasses.replace(optim, clip_grad=norm or 0.0)
    if not run.accumulation_steps:
        steps = deepspeed_file.requested_number(run.deepspeed, "gradient_accumulation_steps")
        run = dataclasses.replace(run, accumulation_steps=int(steps or 1))
    return run, optim


def _precision_of_file(path: str) -> str:
    return deepspeed_file.requested_precision(path) if path else "fp32"


def _check(config: Config) -> None:
    # Before numbers are compared with each other.
    refuse(out_of_range(*(getattr(config, section) for section in SECTIONS)))
    refuse(_contradictions(config))
    if config.contrast.shuffle_group:
        check_shuffle_group(config)


def _contradictions(config: Config) -> list[str]:
    """Describe contradictions, a line each."""
    optim, run, wrong = config.optim, config.run, []
    group = config.model.bn_group_size
    if group == 1:
        wrong.append(
            "BatchNorm needs at least 2 samples in a group (--bn-group-size 1)"
            if "bn_group_size" in config.given or optim.batch_size == 1
            else f"no BatchNorm group of 2 or more images, up to the recipe's, divides "
            f"{config.flag('batch_size')}; choose another --batch-size, or --bn-group-size global"
        )
    elif optim.batch_size % group:
        wrong.append(
            f"{config.flag('bn_group_size')} does not divide {config.flag('batch_size')}: groups "
            "must tile the global batch"
        )
    if optim.warmup_epoch >= optim.epochs:
        wrong.append(
            f"{config.flag('warmup_epoch')} leaves nothing of {config.flag('epochs')}; shorten the "
            "warm-up too"
        )
    if optim.lr_scheduler != "step" and optim.lr_min > config.learning_rate > 0:
        wrong.append(
            f"{config.flag('lr_min')} is above the learning rate {config.learning_rate:g} "
            f"({config.flag('base_lr')} for a batch of {optim.batch_size}), which a cosine falls "
            "from"
        )
    if run.cache and run.decode == "gpu":
        wrong.append(f"--cache {run.cache} keeps what --decode cpu makes, not --decode gpu")
    if run.fsdp_shard_size and run.engine != "fsdp":
        wrong.append(
            f"--fsdp-shard-size {run.fsdp_shard_size} is for --engine fsdp, not {run.engine}"
        )
    if run.engine == "deepspeed" and not run.deepspeed:
        wrong.append("--engine deepspeed needs --deepspeed FILE, such as ds_configs/zero1.json")
    if run.engine != "deepspeed" and run.deepspeed:
        wrong.append(
            f"--engine {run.engine} contradicts --deepspeed {run.deepspeed}; drop one of them"
        )
    return wrong


def check_shard_size(shard_size: int, world: int) -> None:
    """Check that ``--fsdp-shard-size`` divides the processes. Raises UserError."""
    if shard_size and world % shard_size:
        raise UserError(
            f"--fsdp-shard-size {shard_size} does not divide the {world} processes of this job"
        )


def check_shuffle_group(config: Config) -> None:
    """Check that ``--shuffle-group`` fits batch and mode. Raises UserError."""
    group, batch = config.contrast.shuffle_group, config.optim.batch_size
    normalised = config.model.bn_group_size
    if "shuffle_group" in config.given:
        name, instead = f"--shuffle-group {group}", "choose a larger one, or --shuffle-bn world"
    else:
        name = f"--shuffle-bn node: the {group} images of a node"
        instead = "give a larger --shuffle-group, or --shuffle-bn world"
    if config.contrast.shuffle_bn != "node":
        raise UserError(f"{name} is for --shuffle-bn node, not {config.contrast.shuffle_bn}")
    if batch % group or group % normalised:
        raise UserError(
            f"{name}: must be a multiple of {config.flag('bn_group_size')} and divide "
            f"{config.flag('batch_size')}"
        )
    if group == normalised:
        raise UserError(
            f"{name}: that is one BatchNorm group, and shuffling inside it changes nothing; "
            f"{instead}"
        )
