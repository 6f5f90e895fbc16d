"""Evaluate a pretrained encoder: linear classification or kNN."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook

from moco_scale.commands.evaluate_flags import EvalConfig, KnnConfig, add_arguments, config_of
from moco_scale.config.schema import DATASETS
from moco_scale.data.open import open_shards
from moco_scale.data.remote.credentials import warn_of_printed
from moco_scale.data.shards.protocols import Shards
from moco_scale.distributed import collectives, consensus, same_setup
from moco_scale.distributed.collectives import main_log
from moco_scale.engines.base import PRECISIONS
from moco_scale.evaluation import linear, results
from moco_scale.evaluation.features import Pixels, SkippedImages
from moco_scale.evaluation.knn import KnnMonitor, Splits, bank_and_queries, open_splits
from moco_scale.evaluation.pretrained import Pretrained, load_pretrained
from moco_scale.observe.phases import EVALUATION, Phases
from moco_scale.observe.watchdog import Watch
from moco_scale.utils import determinism
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell
from moco_scale.utils.progress import progressed

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> None:
    """Evaluate as the flags say.

    Raises:
        UserError: Something does not fit; every rank raises it.
    """
    config = config_of(args)
    warn_of_printed(config.data_dir)
    collectives.initialize(config.device, hang_timeout=config.hang_timeout)
    determinism.set_switches()
    phases = Phases()
    phases.enter(EVALUATION)
    watch = Watch(phases, config.hang_timeout, Path(config.output_dir), args.program)
    with watch, _encoding_is_progress():
        installation = same_setup.installation(collectives.device())
        same_setup.require_same(installation | same_setup.of_flags(config.flat()))
        evaluate(config)
    collectives.shutdown()


@contextlib.contextmanager
def _encoding_is_progress() -> Iterator[None]:
    """Count every batch that a module computes as progress, within the block."""
    handle = register_module_forward_pre_hook(lambda *_: progressed())
    try:
        yield
    finally:
        handle.remove()


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """One evaluation; every rank calls it.

    Args:
        config: of the command line.

    Returns:
        What went to ``results.json`` for this evaluation: ``top1`` and ``top5`` in percent,
        ``protocol``, the encoder's file, epoch and step, and the settings.

    Raises:
        UserError: something does not fit; every rank raises it.
    """
    started = time.monotonic()
    folder = Path(config.output_dir)
    # Which may index them.
    train = consensus.rank0_first(partial(open_shards, config.source, "train"))

    def prepare() -> Pretrained:
        if collectives.is_main():
            results.require_usable(folder)
        pretrained = load_pretrained(config.pretrained_model, config.encoder)
        _require_agreement(config, pretrained)
        return pretrained

    pretrained = consensus.raise_on_all_ranks(prepare)
    test: KnnMonitor | Shards
    if config.protocol == "knn":
        splits = consensus.rank0_first(partial(open_splits, config.source, train))
        test = consensus.raise_on_all_ranks(partial(_knn, config, pretrained, splits))
    else:
        test = consensus.rank0_first(partial(open_shards, config.source, "val"))
    weights = {"weights in --pretrained-model": pretrained.fingerprint}
    same_setup.require_same(weights, "give all of them the same file")
    main_log.info(
        f"{config.protocol} evaluation of the {config.encoder} encoder in {pretrained.path} "
        f"(epoch {pretrained.epoch}, step {pretrained.step}), "
        f"{collectives.world_size()} process(es) on {collectives.device().type}"
    )
    for warning in determinism.slow_precision(collectives.device(), config.precision):
        main_log.warning(warning)
    if isinstance(test, KnnMonitor):
        measured = _run_knn(config, test, pretrained)
    else:
        measured = _run_linear(config, pretrained, train, test, folder)
    result = {
        **{key: measured.pop(key) for key in ("top1", "top5")},
        "protocol": config.protocol,
        **measured,
        "pretrained_model": str(pretrained.path),
        "encoder": config.encoder,
        "epoch": pretrained.epoch,
        "step": pretrained.step,
        "seconds": round(time.monotonic() - started, 1),
    }
    consensus.broadcast_from_main(lambda: _finish(folder, result))
    return result


def _require_agreement(config: EvalConfig, pretrained: Pretrained) -> None:
    """What older command lines repeat has to be what the file says."""
    for name in ("model", "model_width"):
        given, held = getattr(config, name), pretrained.opt[name]
        if given and given != held:
            raise UserError(
                f"--{name.replace('_', '-')} {given}, but {pretrained.path} holds a {held}; "
                "drop the flag: the file says what it needs"
            )


def _finish(folder: Path, result: dict[str, Any]) -> None:
    # What took hours to find is said, whatever becomes of the file.
    try:
        results.add(folder, result)
    finally:
        _say(folder, result)


def _say(folder: Path, result: dict[str, Any]) -> None:
    best = f" (best epoch {result['best_epoch']})" if "best_epoch" in result else ""
    missing = sum(result.get("left_out", {}).values())
    without = f"; without {missing} images that cannot be decoded" if missing else ""
    last = f", last epoch {result['last_top1']:.2f} %" if "last_top1" in result else ""
    tell(
        f"{result['variant']}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
        f"{best}{last}{without}; {folder / results.NAME}"
    )


def _pixels(config: EvalConfig, pretrained: Pretrained) -> Pixels:
    name = config.dataset or pretrained.opt.get("dataset")
    if name not in DATASETS:
        raise UserError(
            f"{pretrained.path} was trained on a data set {name!r} that is unknown here; "
            f"give --dataset, one of {', '.join(DATASETS)}"
        )
    preset = DATASETS[name]
    own = preset.image_size if config.dataset else pretrained.opt.get("image_size")
    size = config.image_size or own or preset.image_size
    return Pixels(int(size), preset.resize_ratio, preset.mean, preset.std)


def _knn(config: EvalConfig, pretrained: Pretrained, splits: Splits) -> KnnMonitor:
    bank, queries = bank_and_queries(splits, max_bank=config.knn.knn_bank, seed=config.rng_seed)
    return KnnMonitor(
        bank,
        queries,
        **vars(_pixels(config, pretrained)),
        k=config.knn.knn_k,
        temperature=config.knn.knn_t,
        batch_size=max(config.batch_size // collectives.world_size(), 1),
        num_workers=config.num_workers,
        autocast=PRECISIONS[config.precision],
        label="encoding",
        skipped=SkippedImages() if config.bad_samples == "skip" else None,
    )


def _run_knn(config: EvalConfig, task: KnnMonitor, pretrained: Pretrained) -> dict[str, Any]:
    encoder = pretrained.encoder.to(collectives.device())
    if task.hopeless:
        main_log.warning(task.hopeless)
    return {
        **task.measure(encoder, config.features),
        **_skipped(task.skipped),
        "variant": _knn_variant(config),
        "description": (
            f"weighted kNN of Wu et al. 2018 on the {_OUTPUTS[config.features]}, "
            f"k = {config.knn.knn_k}, T = {config.knn.knn_t:g}"
            + ("" if task.queries.split == "val" else "; no val split: a tenth of train held out")
        ),
        "settings": {
            "data_dir": str(config.source),
            "bank": len(task.bank),
            "queries": len(task.queries),
            "k": config.knn.knn_k,
            "temperature": config.knn.knn_t,
            "features": config.features,
            "image_size": task.image_size,
            "precision": config.precision,
            "processes": collectives.world_size(),
        },
    }


def _knn_variant(config: EvalConfig) -> str:
    """Evaluations that differ in it can share a folder; the usual k and T are not named."""
    parts = ["knn", config.features]
    parts += ["key"] if config.encoder == "key" else []
    parts += [f"k{config.knn.knn_k}"] if config.knn.knn_k != KnnConfig.knn_k else []
    parts += [f"t{config.knn.knn_t:g}"] if config.knn.knn_t != KnnConfig.knn_t else []
    return "-".join(parts)


_OUTPUTS = {"features": "backbone's features", "projection": "head's output"}


def _skipped(skipped: SkippedImages | None) -> dict[str, Any]:
    """How many images of each split could not be decoded, where that was no error."""
    return {} if skipped is None else {"left_out": dict(skipped.counts)}


def _run_linear(
    config: EvalConfig,
    pretrained: Pretrained,
    train: Shards,
    val: Shards,
    folder: Path,
) -> dict[str, Any]:
    settings, pixels = config.linear, _pixels(config, pretrained)
    evaluation = linear.LinearEvaluation(
        pretrained,
        train,
        val,
        pixels,
        settings,
        folder,
        resume=config.resume,
        num_workers=config.num_workers,
        autocast=PRECISIONS[config.precision],
        print_freq=config.print_freq,
        bad_samples=config.bad_samples,
    )
    how = "random crops and flips" if settings.aug == "linear" else f"augmentation {settings.aug}"
    if settings.cache_features:
        how = "centre crops encoded once (quick variant, not the published protocol)"
    return {
        **evaluation.run(),
        **_skipped(evaluation.skipped),
        "variant": evaluation.variant,
        "description": (
            f"linear classifier on the {_OUTPUTS[settings.features]}, frozen, {how}, "
            f"schedule {settings.schedule}, {settings.epochs} epochs; top1 and top5 of the best "
            "epoch"
        ),
        "settings": {
            "data_dir": str(config.source),
            **vars(settings),
            "image_size": pixels.image_size,
            "precision": config.precision,
            "processes": collectives.world_size(),
        },
    }
