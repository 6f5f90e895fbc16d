"""Linear classification on frozen features, the protocol of MoCo's published accuracies.

"Momentum Contrast for Unsupervised Visual Representation Learning" (He et al., CVPR 2020),
section 4.1: a linear classifier is trained by SGD on the globally pooled features of the frozen
backbone (BatchNorm with its running statistics), on random crops and flips, and tested on centre
crops. Like pretraining it works on global batches, so its result depends on the number of
processes by rounding only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_scale.data.images.augment import AUGMENTATIONS, draw_params
from moco_scale.data.images.device_augment import DeviceAugment
from moco_scale.data.loading.bad_samples import BadSample
from moco_scale.data.loading.loader import ViewBatch, evaluation_loader, pretraining_loader
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.sampling.windows import REMOTE_WINDOW
from moco_scale.data.shards.protocols import Shards
from moco_scale.distributed import collectives, consensus
from moco_scale.distributed.collectives import main_log
from moco_scale.distributed.run_lock import RunLock, claim_for_all
from moco_scale.evaluation import linear_state
from moco_scale.evaluation.features import (
    Pixels,
    SkippedImages,
    autocasting,
    chosen_output,
    evaluating,
    extract,
    fetched_here,
    progress,
)
from moco_scale.evaluation.linear_config import LinearConfig
from moco_scale.evaluation.pretrained import Pretrained
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable


class LinearEvaluation:
    """Linear evaluation; every rank makes one and calls :meth:`run`.

    Args:
        pretrained: encoder; moved to this process's device.
        train: images to train on.
        val: images to test on.
        pixels: crop and normalisation.
        config: see there.
        folder: for the state after each epoch; exists.
        resume: ``"auto"`` continues the folder's evaluation, ``"none"`` refuses to.
        num_workers: decoding processes on each rank.
        autocast: half-precision type of the encoder; None is fp32. The classifier is fp32.
        print_freq: steps between lines.
        bad_samples: "skip": another image replaces a training image that cannot be decoded, and
            such test images do not count.

    Raises:
        UserError: Images have no labels, the batch does not fit, the folder holds another
            evaluation or a running one of this kind, or its state is damaged.
        StoppedEarly: An evaluation of this kind on another host writes to the folder.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        train: Shards,
        val: Shards,
        pixels: Pixels,
        config: LinearConfig,
        folder: Path,
        *,
        resume: str = "auto",
        num_workers: int = 4,
        autocast: torch.dtype | None = None,
        print_freq: int = 100,
        bad_samples: str = "error",
    ) -> None:
        self.config, self.pixels = config, pixels
        suffix = "" if pretrained.which == "query" else f"-{pretrained.which}"
        self.variant = config.variant + suffix
        self.state_path = folder / f"{self.variant}.pth"
        self.train, self.val = train, val
        self.num_workers, self.autocast, self.print_freq = num_workers, autocast, print_freq
        self.bad_samples = bad_samples
        self.skipped = SkippedImages() if bad_samples == "skip" else None
        self._replaced: list[BadSample] = []  # in training, on this rank, not yet reported
        self._unread: list[BadSample] = []
        self.world, self.rank = collectives.world_size(), collectives.rank()
        self.device = collectives.device()
        self.num_classes = _count_classes(train, val)
        order = train.order(config.seed, REMOTE_WINDOW if train.remote_parts() else 0)
        self.plan = BatchPlan(order, config.batch_size)
        self.plan.check_world(self.world)
        encoder = pretrained.encoder.to(self.device)
        self.encode = chosen_output(encoder, config.features)
        self.width = encoder.feature_dim if config.features == "features" else pretrained.opt["dim"]
        self.classifier = _new_classifier(self.width, self.num_classes, config.seed)
        self.classifier.to(self.device)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.identity = {
            **config.defining(),
            "encoder": pretrained.fingerprint,
            "train images": train.fingerprint,
            "val images": val.fingerprint,
            "image_size": pixels.image_size,
            "resize_ratio": pixels.resize_ratio,
            "mean": list(pixels.mean),
            "std": list(pixels.std),
        }
        self.history: list[dict[str, float]] = []
        self._failure: UserError | None = None
        self.described = {
            "encoder": pretrained.described,
            **{f"{s.split} images": f"{len(s)} in {s.name}" for s in (train, val)},
        }
        # Two evaluations of one kind would overwrite each other's state.
        self._lock = RunLock(folder / f".{self.variant}.lock")
        claim_for_all(self._lock)
        state = linear_state.load(
            self.state_path, self.identity, self.described, resume, self.classifier.state_dict()
        )
        if state is not None:
            self.classifier.load_state_dict(state["classifier"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["momenta"], "param_groups": groups})
            self.history = state["history"]

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def run(self) -> dict[str, Any]:
        """Train the remaining epochs.

        Returns:
            In percent on the test images: ``top1``, ``top5`` of the best epoch (by top-1, the
            first of equals), ``last_top1``, ``last_top5`` of the last; ``best_epoch`` counts from
            1. Also ``history`` with one entry an epoch.

        Raises:
            UserError: An image cannot be read, the loss is not finite, or the state cannot be
                written; every rank raises it.
        """
        if self.epoch:
            main_log.info(f"resumed after epoch {self.epoch} of {self.config.epochs}")
        if self.epoch < self.config.epochs:
            with evaluating(self.encode):
                self._run()
        best = max(self.history, key=lambda entry: entry["top1"])
        return {
            "top1": best["top1"],
            "top5": best["top5"],
            "best_epoch": self.history.index(best) + 1,
            "last_top1": self.history[-1]["top1"],
            "last_top5": self.history[-1]["top5"],
            "history": self.history,
        }

    def _run(self) -> None:
        caches = [self._cache(self.train, True), self._cache(self.val, False)]
        batches = self._batches(caches[0])
        try:
            for epoch in range(self.epoch, self.config.epochs):
                trained = self._train_epoch(epoch, batches)
                if self.skipped is not None:
                    self.skipped.add(self.train, self._replaced)
                    self._replaced.clear()
                tested = self._test(caches[1])
                self.history.append({**trained, **tested})
                best = max(entry["top1"] for entry in self.history)
                main_log.info(
                    f"epoch {epoch + 1}/{self.config.epochs}: loss {trained['train_loss']:.4f}, "
                    f"train top-1 {trained['train_top1']:.2f} %, val top-1 {tested['top1']:.2f} %, "
                    f"top-5 {tested['top5']:.2f} %, best top-1 {best:.2f} %"
                )
                self._save()
        finally:
            batches.close()

    def _cache(self, shards: Shards, gather: bool) -> tuple[Tensor, Tensor] | None:
        if not self.config.cache_features:
            return None
        features, labels = extract(
            self.encode,
            shards,
            **vars(self.pixels),
            num_workers=self.num_workers,
            autocast=self.autocast,
            gather=gather,
            label=f"encoding {shards.split}",
            skipped=self.skipped,
        )
        if gather and self.skipped is not None and self.skipped.places:
            # The next image replaces one that cannot be decoded.
            places = np.arange(len(shards))
            readable = np.setdiff1d(places, list(self.skipped.places))
            if not len(readable):
                raise UserError(f"none of the {len(shards)} {shards.split} images can be decoded")
            rows = np.searchsorted(readable, places).clip(max=len(readable) - 1)
            features, labels = features[rows], labels[rows]
        return features, labels.to(self.device)

    def _batches(self, cache: tuple[Tensor, Tensor] | None) -> Generator[tuple[Tensor, Tensor]]:
        """Yield this rank's features [b, D] and labels [b] of each remaining step."""
        steps = range(
            self.epoch * self.plan.steps_per_epoch, self.config.epochs * self.plan.steps_per_epoch
        )
        if cache is not None:
            for step in steps:
                mine = torch.from_numpy(self.plan.share(step, self.rank, self.world).index.copy())
                mine = mine.to(self.device)
                yield cache[0][mine], cache[1][mine]
            return
        aug = AUGMENTATIONS[self.config.aug].of(0)
        if self.config.crop_min:
            aug = replace(aug, crop_min=self.config.crop_min)
        augment = DeviceAugment(aug, self.pixels.mean, self.pixels.std)
        with pretraining_loader(
            self.train,
            self.plan,
            aug,
            self.pixels.image_size,
            views=1,
            rank=self.rank,
            world=self.world,
            num_workers=self.num_workers,
            start_step=steps.start,
            end_step=steps.stop,
            bad_samples=self.bad_samples,
            fetches_ahead=collectives.local_rank() == 0,
        ) as loader:
            for batch in loader:
                self._replaced += batch.bad
                crops = batch.views[0].to(self.device, non_blocking=True)
                named = batch.passes.numpy(), batch.index.numpy()
                params = draw_params(aug, self.config.seed, *named, 0)
                yield self._features(augment(crops, params)), self._labels(batch)

    def _features(self, x: Tensor) -> Tensor:
        with torch.no_grad(), autocasting(self.autocast):
            return self.encode(x.contiguous(memory_format=torch.channels_last)).float()

    def _labels(self, batch: ViewBatch) -> Tensor:
        return batch.labels.to(self.device, non_blocking=True)

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the next batch; after an error an empty one, as the others wait for this rank."""
        try:
            return next(batches)
        except UserError as error:
            self._failure = error
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return torch.empty(0, self.width, device=self.device), nothing

    def _train_epoch(
        self, epoch: int, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        steps, size = self.plan.steps_per_epoch, self.config.batch_size
        terminal = sys.stderr.isatty()
        label = f"epoch {epoch + 1}/{self.config.epochs}" if terminal else ""
        loss_sum, right = 0.0, 0.0
        for i in progress(range(steps), steps, label):
            rate = self.config.rate(epoch * steps + i, steps)
            loss, hits = self._step(*self._next(batches), rate)
            loss_sum, right = loss_sum + loss, right + hits
            if not terminal and (i + 1) % self.print_freq == 0:
                main_log.info(
                    f"epoch {epoch + 1} step {i + 1}/{steps} loss {loss:.4f} lr {rate:.4g}"
                )
        return {"train_loss": loss_sum / steps, "train_top1": 100 * right / (steps * size)}

    @torch.enable_grad()
    def _step(self, features: Tensor, labels: Tensor, rate: float) -> tuple[float, float]:
        """Take an SGD step on the global batch; return its mean loss and number of hits."""
        logits = self.classifier(features)
        loss = F.cross_entropy(logits, labels, reduction="sum") / self.config.batch_size
        parameters = list(self.classifier.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        right = (logits.detach().argmax(1) == labels).sum()
        failed = torch.tensor(float(self._failure is not None), device=self.device)
        extra = torch.stack([loss.detach(), right.float(), failed])
        # One message for all sums over ranks.
        flat = collectives.sum_(torch.cat([*(g.flatten() for g in gradients), extra]))
        loss_value, hits, failures = flat[-3:].tolist()
        if failures:
            raise consensus.first_error(self._failure) or UserError("a process failed")
        if not math.isfinite(loss_value):
            raise UserError(
                f"linear evaluation: the loss is {loss_value}; use a smaller --lr than "
                f"{self.config.learning_rate:g}"
            )
        sizes = [p.numel() for p in parameters]
        for parameter, gradient in zip(parameters, flat[:-3].split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return loss_value, hits

    def _test(self, cache: tuple[Tensor, Tensor] | None) -> dict[str, float]:
        """Measure the accuracy on the test images, each rank on its share."""
        hits = torch.zeros(3, dtype=torch.int64, device=self.device)
        self._unread = []
        failure: UserError | None = None
        try:
            for features, labels in self._test_batches(cache):
                with torch.no_grad():
                    logits = self.classifier(features)
                ranking = logits.topk(min(5, self.num_classes), dim=1).indices
                right = ranking == labels[:, None]
                tested = torch.tensor(len(labels), device=self.device)
                hits += torch.stack([right[:, 0].sum(), right.sum(), tested])
        except UserError as error:
            failure = error
        failure = consensus.first_error(failure)
        if failure is not None:
            raise failure
        if self.skipped is not None and cache is None:
            self.skipped.add(self.val, self._unread)
        *right_ones, tested = collectives.sum_(hits).tolist()
        if not tested:
            raise UserError(f"none of the {len(self.val)} test images can be decoded")
        top1, top5 = (100.0 * count / tested for count in right_ones)
        return {"top1": top1, "top5": top5}

    def _test_batches(self, cache: tuple[Tensor, Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
        if cache is not None:
            yield cache
            return
        with evaluation_loader(
            self.val,
            self.pixels.image_size,
            self.pixels.resize_ratio,
            batch_size=max(self.config.batch_size // self.world, 1),
            rank=self.rank,
            world=self.world,
            num_workers=self.num_workers,
            bad_samples=self.bad_samples,
            fetches_for=fetched_here(self.val),
        ) as loader:
            for batch in progress(loader, len(loader), "testing" if sys.stderr.isatty() else ""):
                self._unread += batch.bad
                crops = batch.views[0].to(self.device, non_blocking=True)
                yield self._features(self.pixels.normalise(crops)), self._labels(batch)

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "described": self.described,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        linear_state.save(self.state_path, state)


def _count_classes(train: Shards, val: Shards) -> int:
    highest = 0
    for shards in (train, val):
        missing = int((shards.labels < 0).sum())
        if missing:
            raise UserError(
                f"linear evaluation needs labels: {missing} of the {len(shards)} {shards.split} "
                f"images in {shards.name} have none"
                + (f" that is used: {shards.why_unlabelled}" if shards.why_unlabelled else "")
            )
        highest = max(highest, int(shards.labels.max()))
    known = set(train.labels.tolist())
    strangers = sorted(set(val.labels.tolist()) - known)
    if strangers:
        raise UserError(
            f"{val.name}: {len(strangers)} classes of the val images are in no train "
            f"image (first: {_named(train, strangers[0])}), so nothing can learn them; "
            "make the shards from a source whose splits have the same classes"
        )
    return max(len(train.classes), highest + 1)


def _named(shards: Shards, label: int) -> str:
    return printable(shards.classes[label], 60) if label < len(shards.classes) else str(label)


def _new_classifier(width: int, classes: int, seed: int) -> nn.Linear:
    """Make a classifier as the official code does: weights normal(0, 0.01) by seed, bias 0."""
    classifier = nn.utils.skip_init(nn.Linear, width, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        classifier.weight.normal_(0, 0.01, generator=generator)
        classifier.bias.zero_()
    return classifier
