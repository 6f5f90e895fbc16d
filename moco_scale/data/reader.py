"""Batches of crops: what the workers make of the samples that a plan names.

A crop is a function of (seed, pass, sample, view), where the pass says how often the data set was
gone through before. So neither the number of ranks nor the number of workers changes what is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from moco_scale.data.augment import Augmentation
from moco_scale.data.bad_samples import TRIES, BadSample, bad_sample, substitutes
from moco_scale.data.decode import DecodeError, Decoder, Pixels
from moco_scale.data.fetch_ahead import FetchAhead, Job, check_room
from moco_scale.data.index import shard_command
from moco_scale.data.order import BatchPlan, Samples
from moco_scale.data.random import uniforms
from moco_scale.data.shard_set import Pictures
from moco_scale.data.views import CROP_SLOTS, crop_box, write_centre, write_crop
from moco_scale.data.workers import PREFETCHED, BatchLoader, Failure, Reading, batch_memory
from moco_scale.errors import UserError


class ViewBatch(NamedTuple):
    """One rank's share of a batch: b samples with V views each."""

    step: int
    epoch: int
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    """int64 [b], the samples' places in the data set."""
    passes: Tensor
    """int64 [b], how often the data set was gone through before; see `order.Samples`."""
    labels: Tensor
    """int64 [b], -1 where there is none."""
    views: Tensor
    """uint8 [V, b, 3, S, S], RGB, cropped and not augmented any further."""
    bad: Sequence[BadSample] = ()
    """Samples that cannot be decoded. In pretraining another is seen in the place of each, under
    its number and with its own label; in evaluation they are left out."""


def pretraining_loader(
    shards: Pictures,
    plan: BatchPlan,
    aug: Augmentation,
    image_size: int,
    *,
    views: int = 2,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 2,
    start_step: int = 0,
    end_step: int,
    bad_samples: str = "error",
    start_method: str | None = None,
    fetches_ahead: bool = True,
) -> BatchLoader[ViewBatch]:
    """This rank's batches of random crops for the steps start_step to end_step - 1.

    One pool of workers serves all epochs. Each worker builds whole batches in shared memory; with
    a GPU they are pinned. `start_method` of the workers: "fork" where there is one, by default.
    `bad_samples`: see `bad_samples.POLICIES`. `fetches_ahead`: this rank fetches remote shards
    ahead, for all ranks of its machine. Raises UserError, also while iterating: a batch that
    `world` does not divide, a picture that cannot be decoded, a worker that died, a shard that
    cannot be fetched, a cache that is too small for the plan.
    """
    if len(shards) != plan.order.num_samples:
        raise ValueError(
            f"a plan for {plan.order.num_samples} samples, but there are {len(shards)}"
        )
    plan.check_world(world)
    crops = _RandomCrops(shards, plan.order.seed, aug.crop_min, aug.crop_max, image_size, views)
    crops.skip = bad_samples == "skip"
    ahead, parts = None, shards.remote_parts()
    if parts and start_step < end_step:
        in_flight = max(1, PREFETCHED * num_workers)
        check_room(parts, plan, in_flight)
        if fetches_ahead:
            ahead = FetchAhead(Job(parts, plan, start_step, end_step, in_flight))
    jobs = _PlannedJobs(plan, rank, world, start_step, end_step, ahead)
    return BatchLoader(crops, jobs, num_workers, start_method, crops.reading, ahead)


def evaluation_loader(
    shards: Pictures,
    image_size: int,
    resize_ratio: float,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 2,
    bad_samples: str = "error",
    start_method: str | None = None,
) -> BatchLoader[ViewBatch]:
    """Centre crops (one view) of the samples `rank_slice(len(shards), rank, world)`, in order.

    Nothing is dropped but what cannot be decoded, with `bad_samples` "skip": the last batch may be
    smaller, and ranks may differ by one sample. `step` counts the batches of this rank, `epoch` is
    0. Raises UserError as `pretraining_loader` does.
    """
    if resize_ratio < 1:
        raise ValueError(f"resize_ratio {resize_ratio}: pictures smaller than the crop")
    jobs = _OrderedJobs(rank_slice(len(shards), rank, world), batch_size)
    crops = _CentreCrops(shards, image_size, resize_ratio)
    crops.skip = bad_samples == "skip"
    return BatchLoader(crops, jobs, num_workers, start_method, crops.reading)


def rank_slice(num_samples: int, rank: int, world: int) -> range:
    """The contiguous share of `rank` when nothing is dropped; shares differ by one at most."""
    return range(num_samples * rank // world, num_samples * (rank + 1) // world)


class _Job(NamedTuple):
    step: int
    epoch: int
    samples: Samples


class _PlannedJobs(Sampler[_Job]):
    def __init__(
        self,
        plan: BatchPlan,
        rank: int,
        world: int,
        start: int,
        end: int,
        ahead: FetchAhead | None,
    ) -> None:
        self.plan, self.rank, self.world, self.ahead = plan, rank, world, ahead
        self.steps = range(start, end)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[_Job]:
        for step in self.steps:
            if self.ahead is not None:
                self.ahead.at(step)
            samples = self.plan.share(step, self.rank, self.world)
            yield _Job(step, self.plan.epoch_of(step), samples)


class _OrderedJobs(Sampler[_Job]):
    def __init__(self, samples: range, batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[_Job]:
        for step in range(len(self)):
            part = self.samples[step * self.batch_size : (step + 1) * self.batch_size]
            index = np.asarray(part, dtype=np.int64)
            yield _Job(step, 0, Samples(index, np.zeros_like(index)))


class _Crops(Dataset[Any]):
    """Turns a job into a batch; runs in the workers."""

    views = 1
    skip = False
    """Whether a picture that cannot be decoded is reported in the batch, not raised."""

    def __init__(self, shards: Pictures, image_size: int) -> None:
        self.shards, self.image_size = shards, image_size
        self.reading = Reading(shards)
        self.decode = Decoder()

    def __getitem__(self, job: _Job) -> ViewBatch | Failure:
        shape = (self.views, len(job.samples.index), 3, self.image_size, self.image_size)
        try:
            views = batch_memory(shape)
            batch = self.fill(views, job)
            self.reading.begin(-1)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return Failure(str(error))
        finally:
            self.shards.rest()
        return batch

    def fill(self, views: Tensor, job: _Job) -> ViewBatch:
        raise NotImplementedError

    def batch(
        self, job: _Job, samples: Samples, seen: Sequence[int], views: Tensor, bad: list[BadSample]
    ) -> ViewBatch:
        """A batch of samples, of which `seen` are the pictures."""
        index, passes = (torch.from_numpy(np.array(column)) for column in samples)
        labels = self.shards.labels[np.asarray(seen, dtype=np.int64)].astype(np.int64)
        return ViewBatch(
            job.step, job.epoch, index, passes, torch.from_numpy(labels), views, tuple(bad)
        )

    def pixels(self, sample: int) -> Pixels:
        """RGB pixels of a picture, uint8 [H, W, 3]; the next call may overwrite them.

        Raises DecodeError.
        """
        self.reading.begin(sample)
        return self.decode(self.shards.read(sample))

    def bad(self, sample: int, error: DecodeError, replacement: int = -1) -> BadSample:
        """The record of a bad sample; UserError where it may not be."""
        record = bad_sample(self.shards, sample, str(error), replacement)
        if self.skip:
            return record
        folder = self.shards.name
        raise UserError(
            f"cannot decode the picture in {folder}, {self.shards.where(sample)}: {record.reason}. "
            "Go on without it with --bad-samples skip, or make the shards again with "
            f"`{shard_command('PICTURES', folder)} --verify --overwrite`, which leaves such "
            "pictures out and lists them"
        )


class _RandomCrops(_Crops):
    def __init__(
        self,
        shards: Pictures,
        seed: int,
        crop_min: float,
        crop_max: float,
        image_size: int,
        views: int,
    ) -> None:
        super().__init__(shards, image_size)
        self.seed, self.crop_min, self.crop_max, self.views = seed, crop_min, crop_max, views

    def fill(self, views: Tensor, job: _Job) -> ViewBatch:
        index, passes = job.samples
        draws = [
            uniforms(self.seed, passes, index, view, CROP_SLOTS).tolist()
            for view in range(self.views)
        ]
        seen, bad = index.tolist(), list[BadSample]()
        for i, sample in enumerate(index.tolist()):
            try:
                pixels = self.pixels(sample)
            except DecodeError as error:
                pixels, seen[i] = self.substitute(sample, int(passes[i]), error)
                bad.append(self.bad(sample, error, seen[i]))
            for view in range(self.views):
                height, width = pixels.shape[:2]
                box = crop_box(draws[view][i], height, width, self.crop_min, self.crop_max)
                write_crop(views[view, i], pixels, box)
        return self.batch(job, job.samples, seen, views, bad)

    def substitute(self, sample: int, passes: int, error: DecodeError) -> tuple[Pixels, int]:
        """Pixels of another picture, and which it is."""
        if not self.skip:
            self.bad(sample, error)
        for other in substitutes(self.seed, passes, sample, len(self.shards)):
            with contextlib.suppress(DecodeError):
                return self.pixels(other), other
        raise UserError(
            f"cannot decode the picture in {self.shards.name}, {self.shards.where(sample)}: "
            f"{error}; nor any of {TRIES} others tried in its place. Is this a set of pictures? "
            f"`python -m moco_scale shard --check {self.shards.name}` lists what is wrong"
        )


class _CentreCrops(_Crops):
    def __init__(self, shards: Pictures, image_size: int, resize_ratio: float) -> None:
        super().__init__(shards, image_size)
        self.resize_ratio = resize_ratio

    def fill(self, views: Tensor, job: _Job) -> ViewBatch:
        kept, bad = list[int](), list[BadSample]()
        for i, sample in enumerate(job.samples.index.tolist()):
            try:
                write_centre(views[0, len(kept)], self.pixels(sample), self.resize_ratio)
                kept.append(i)
            except DecodeError as error:
                bad.append(self.bad(sample, error))
        samples = Samples(*(column[kept] for column in job.samples))
        return self.batch(job, samples, samples.index.tolist(), views[:, : len(kept)], bad)
