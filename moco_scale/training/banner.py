"""Run summary: what is trained and how it differs from its recipe, logged before the first step."""

from __future__ import annotations

from typing import Any

from moco_scale import __version__
from moco_scale.config.recipes import RECIPES
from moco_scale.config.resolve import build
from moco_scale.config.schema import Config
from moco_scale.data.shards.mixed_shards import epoch_notes
from moco_scale.distributed import collectives
from moco_scale.methods.key_queue import crowded_queue
from moco_scale.models.batchnorm import GroupedBatchNorm
from moco_scale.training.run import Run
from moco_scale.utils import determinism

_CHANCE = ("rng_seed",)
"""Fields in which repetitions of a published run differ."""
_FEW = 0.01  # share of the published images that may be missing


def run_summary(run: Run, dropped: int) -> list[str]:
    """Make the first lines of a run's log, the same on every rank.

    Args:
        run: complete, at its first step.
        dropped: log lines of later steps that a resume has removed.
    """
    config, local = run.config, run.config.optim.batch_size // collectives.world_size()
    recipe = RECIPES[config.recipe]
    published = f"; published: {recipe.published}" if _is_published(config, len(run.shards)) else ""
    lines = [
        f"moco_scale {__version__}, recipe {config.recipe}: {config.model.model}, "
        f"{config.data.dataset} in {config.source} ({len(run.shards)} images)",
        f"source: {recipe.source}{published}",
        *_changes(config),
        f"{collectives.world_size()} process(es) on {run.device.type}, engine "
        f"{config.run.engine}, {config.run.precision}; global batch {config.optim.batch_size}, "
        f"{local} a process, {_groups(config.model.bn_group_size, local)}; "
        f"{config.optim.epochs} epochs of {run.plan.steps_per_epoch} steps",
        *epoch_notes(run.shards, run.plan.order),
        *run.engine.notes,
        *_extras(config),
    ]
    if run.resumed_from is not None:
        again = f" ({dropped} later log lines dropped)" if dropped else ""
        lines.append(f"resumed from {run.resumed_from} at step {run.step}{again}")
    return lines


def cautions(run: Run) -> list[str]:
    """Warn of settings that work and are hardly meant."""
    config, lines = run.config, determinism.slow_precision(run.device, run.config.run.precision)
    if any(isinstance(m, GroupedBatchNorm) for m in run.engine.moco.modules()):
        lines += _shuffles_in_vain(config)
    if not config.contrast.mask_same_image:
        lines += crowded_queue(config.contrast.nce_k, len(run.shards))
    return lines


def title(config: Config, images: int) -> str:
    """Make the title of a run's figures."""
    changed = "" if _is_published(config, images) else ", with other settings"
    return f"{config.model.model} on {config.data.dataset}, recipe {config.recipe}{changed}"


def changed(config: Config) -> dict[str, tuple[Any, Any]]:
    """Find defining settings that differ from the recipe: (the recipe's, this run's) by field."""
    # Crop, stem and statistics come with a data set: only the set itself is a change then.
    recipe = build(config.recipe, {"dataset": config.data.dataset}).defining()
    recipe["dataset"] = RECIPES[config.recipe].settings["dataset"]
    now = config.defining()
    return {name: (recipe[name], now[name]) for name in now if recipe[name] != now[name]}


def _is_published(config: Config, samples: int) -> bool:
    """Tell whether the recipe's published figure applies to this run."""
    usual = RECIPES[config.recipe].published_for
    for name, (_, value) in changed(config).items():
        if name not in _CHANCE and value not in usual.get(name, ()):
            return False
    images = config.preset.images
    return images is None or abs(samples - images) <= _FEW * images


def _changes(config: Config) -> list[str]:
    """Describe differences from the recipe: those asked for, and those that follow from them."""
    different = changed(config)
    words = (
        f"--{name.replace('_', '-')} {_word(now)} ({_word(before)})"
        for name, (before, now) in different.items()
        if name in config.given
    )
    asked = ", ".join(words)
    lines = [f"not as in the recipe (its value in brackets): {asked}"] if asked else []
    batch, epochs = config.optim.batch_size, config.optim.epochs
    followed = {
        "bn_group_size": ("BatchNorm group", f"the recipe's does not divide the batch of {batch}"),
        "warmup_epoch": ("warm-up", f"the recipe's leaves nothing of {epochs} epochs"),
        "shuffle_window": ("shuffle window", "the images are remote"),
        "shuffle_group": ("shuffle group", "the images of one node at the run's start"),
        "clip_grad": ("gradient clipping", f"set in {config.run.deepspeed}"),
    }
    for name, (before, now) in different.items():
        if name not in config.given:
            what, why = followed.get(name, (name.replace("_", " "), "it follows from the rest"))
            lines.append(f"{what} {_word(before)} -> {_word(now)}: {why}")
    return lines


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _groups(group: int, local: int) -> str:
    if group <= local:
        return f"BatchNorm groups of {group}"
    return f"BatchNorm groups of {group}, each over {group // local} processes"


def _shuffles_in_vain(config: Config) -> list[str]:
    """Warn where the batch is a single BatchNorm group, and name a remedy."""
    batch, group, mode = config.optim.batch_size, config.model.bn_group_size, config.contrast
    if mode.shuffle_bn == "off" or group != batch:
        return []
    smaller = next((g for g in range(batch // 2, 1, -1) if batch % g == 0), None)
    remedy = (
        f"--bn-group-size {smaller} makes {batch // smaller} of them"
        if smaller
        else "choose a --batch-size that can be divided"
    )
    return [
        f"the {batch} images of a step are one BatchNorm group"
        + ("" if "bn_group_size" in config.given else ", the default without --bn-group-size")
        + f", so --shuffle-bn {mode.shuffle_bn} changes no statistics: queries and keys share "
        f"them, and the loss can fall although nothing is learned; {remedy}"
    ]


def _extras(config: Config) -> list[str]:
    """List optional features in use."""
    extras = []
    if config.run.accumulation_steps > 1:
        extras.append(f"{config.run.accumulation_steps} micro-batches per step")
    if config.optim.clip_grad:
        extras.append(f"gradients are clipped at norm {config.optim.clip_grad}")
    if config.run.activation_checkpointing:
        extras.append("activation checkpointing")
    if config.run.compile:
        extras.append("blocks are compiled; the first steps take minutes")
    return ["; ".join(extras)] if extras else []
