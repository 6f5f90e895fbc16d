"""Batches of crops, made by workers from the samples of a plan.

A crop is a function of (seed, pass, sample, view), where the pass counts how often the data set was
read before. So neither the number of ranks nor that of workers changes what is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from moco_scale.data.images.augment import Augmentation
from moco_scale.data.images.crop import CROP_SLOTS, Box, crop_box, write_centre, write_crop
from moco_scale.data.images.decode import (
    DecodeError,
    Decoder,
    Pixels,
    image_size,
    orientation,
    without_exif,
)
from moco_scale.data.images.device_decode import BadImage, DeviceDecoder, EncodedViews, can_decode
from moco_scale.data.loading.bad_samples import (
    TRIES,
    BadSample,
    bad_sample,
    how_to_check,
    substitutes,
)
from moco_scale.data.loading.pixel_cache import PixelCache
from moco_scale.data.loading.workers import PREFETCHED, BatchLoader, Failure, Reading, batch_memory
from moco_scale.data.remote.prefetch import FetchAhead, Job, check_room
from moco_scale.data.sampling.order import BatchPlan, Samples, Slices
from moco_scale.data.sampling.random import uniforms
from moco_scale.data.shards.protocols import Images
from moco_scale.utils.errors import UserError

_SPARE_SHARDS = 8  # that an evaluation has fetched ahead


class ViewBatch(NamedTuple):
    """Share of a batch on one rank: b samples with V views each."""

    step: int
    epoch: int
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    """int64 [b], the samples' places in the data set."""
    passes: Tensor
    """int64 [b], how often the data set was gone through before; see `order.Samples`."""
    labels: Tensor
    """int64 [b], -1 where there is none."""
    views: Tensor
    """uint8 [V, b, 3, S, S], RGB, cropped and not augmented any further. In memory the three
    colours of a pixel may lie together, as decoders and resizing have them."""
    bad: Sequence[BadSample] = ()
    """Samples that cannot be decoded. In pretraining another replaces each, under its number and
    with its own label; in evaluation they are skipped."""


def pretraining_loader(
    shards: Images,
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
    cache: PixelCache | None = None,
    decoder: DeviceDecoder | None = None,
    lost: Callable[[str], None] | None = None,
) -> BatchLoader[ViewBatch]:
    """Load this rank's batches of random crops for the steps start_step to end_step - 1.

    One pool of workers serves all epochs. Each worker builds whole batches in shared memory; with a
    GPU they are pinned.

    Args:
        shards: images.
        plan: of the batches.
        aug: gives the range of the crops' area.
        image_size: side of the crops.
        views: of each sample.
        rank: this one.
        world: number of ranks.
        num_workers: processes; 0 reads in this one.
        start_step: first step.
        end_step: after the last step.
        bad_samples: see `bad_samples.POLICIES`.
        start_method: of the workers; "fork" where there is one, by default.
        fetches_ahead: this rank fetches remote shards ahead, for all ranks of its machine.
        cache: keeps decoded images.
        decoder: decodes on a device, where the views then lie.
        lost: see `BatchLoader`.

    Raises:
        UserError: Also while iterating: `world` does not divide the batch, an image cannot be
            decoded, a worker died, a shard cannot be fetched, or the cache is too small for the
            plan.
    """
    if len(shards) != plan.order.num_samples:
        raise ValueError(
            f"a plan for {plan.order.num_samples} samples, but there are {len(shards)}"
        )
    plan.check_world(world)
    kind = _RandomCrops if decoder is None else _EncodedCrops
    crops = kind(shards, plan.order.seed, aug.crop_min, aug.crop_max, image_size, views)
    crops.skip, crops.cache = bad_samples == "skip", cache
    finish: Callable[[ViewBatch], ViewBatch] | None = None
    if decoder is not None:
        finish = partial(_decoded, decoder, shards)
    ahead, parts = None, shards.remote_parts()
    if parts and start_step < end_step:
        in_flight = max(1, PREFETCHED * num_workers)
        check_room(parts, plan, in_flight)
        if fetches_ahead:
            ahead = FetchAhead(Job(parts, plan, start_step, end_step, in_flight))
    jobs = _PlannedJobs(plan, rank, world, start_step, end_step, ahead)
    return BatchLoader(crops, jobs, num_workers, start_method, crops.reading, ahead, finish, lost)


def evaluation_loader(
    shards: Images,
    image_size: int,
    resize_ratio: float,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 2,
    bad_samples: str = "error",
    start_method: str | None = None,
    fetches_for: Sequence[int] = (),
) -> BatchLoader[ViewBatch]:
    """Load centre crops (one view) of the samples of `rank_slice`, in order.

    Only images that cannot be decoded are dropped, with `bad_samples` "skip": the last batch may be
    smaller, and ranks may differ by one sample. `step` counts the batches of this rank, `epoch` is
    0.

    Args:
        shards: images.
        image_size: side of the crops.
        resize_ratio: of the short side to the crop.
        batch_size: of this rank.
        rank: this one.
        world: number of ranks.
        num_workers: processes; 0 reads in this one.
        bad_samples: see `bad_samples.POLICIES`.
        start_method: of the workers; "fork" where there is one, by default.
        fetches_for: ranks of this machine for which this one fetches remote shards ahead.

    Raises:
        UserError: As in `pretraining_loader`.
    """
    if resize_ratio < 1:
        raise ValueError(f"resize_ratio {resize_ratio}: images smaller than the crop")
    ahead, parts = None, shards.remote_parts() if fetches_for else []
    if parts and len(shards):
        slices = Slices(tuple(rank_slice(len(shards), r, world) for r in fetches_for), batch_size)
        in_flight = max(1, PREFETCHED * num_workers)
        ahead = FetchAhead(Job(parts, slices, 0, len(slices), in_flight, _SPARE_SHARDS))
    jobs = _OrderedJobs(rank_slice(len(shards), rank, world), batch_size, ahead)
    crops = _CentreCrops(shards, image_size, resize_ratio)
    crops.skip = bad_samples == "skip"
    return BatchLoader(crops, jobs, num_workers, start_method, crops.reading, ahead)


def rank_slice(num_samples: int, rank: int, world: int) -> range:
    """Return a rank's contiguous share, nothing dropped; shares differ by one at most."""
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
    def __init__(self, samples: range, batch_size: int, ahead: FetchAhead | None) -> None:
        self.samples, self.batch_size, self.ahead = samples, batch_size, ahead

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[_Job]:
        for step in range(len(self)):
            if self.ahead is not None:
                self.ahead.at(step)
            part = self.samples[step * self.batch_size : (step + 1) * self.batch_size]
            index = np.asarray(part, dtype=np.int64)
            yield _Job(step, 0, Samples(index, np.zeros_like(index)))


class _Crops(Dataset[Any]):
    """Turns a job into a batch; runs in the workers."""

    views = 1
    skip = False
    """Report an image that cannot be decoded in the batch, instead of raising."""
    cache: PixelCache | None = None

    def __init__(self, shards: Images, image_size: int) -> None:
        self.shards, self.image_size = shards, image_size
        self.reading = Reading(shards)
        self.decode = Decoder()

    def __getitem__(self, job: _Job) -> ViewBatch | Failure:
        try:
            batch = self.made(job)
            self.reading.begin(-1)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return Failure(str(error))
        finally:
            self.shards.rest()
        return batch

    def made(self, job: _Job) -> ViewBatch:
        raise NotImplementedError

    def memory(self, images: int) -> Tensor:
        """Allocate uint8 [V, images, 3, S, S]."""
        return batch_memory((self.views, images, 3, self.image_size, self.image_size))

    def batch(
        self, job: _Job, samples: Samples, seen: Sequence[int], views: Tensor, bad: list[BadSample]
    ) -> ViewBatch:
        """Make the batch of samples, of which `seen` are the images."""
        index, passes = (torch.from_numpy(np.array(column)) for column in samples)
        labels = self.shards.labels[np.asarray(seen, dtype=np.int64)].astype(np.int64)
        return ViewBatch(
            job.step, job.epoch, index, passes, torch.from_numpy(labels), views, tuple(bad)
        )

    def pixels(self, sample: int) -> Pixels:
        """Read RGB pixels of an image, uint8 [H, W, 3]; the next call may overwrite them.

        Raises:
            DecodeError: The image is bad.
        """
        kept = self.cache.get(sample) if self.cache is not None else None
        if kept is not None:
            return kept
        self.reading.begin(sample)
        pixels = self.decode(self.shards.read(sample))
        if self.cache is not None:
            self.cache.put(sample, pixels)
        return pixels

    def bad(self, sample: int, error: DecodeError, replacement: int = -1) -> BadSample:
        """Make the record of a bad sample. Raises UserError where none is allowed."""
        record = bad_sample(self.shards, sample, str(error), replacement)
        if self.skip:
            return record
        raise UserError(
            f"cannot decode the image in {self.shards.name}, {self.shards.where(sample)}: "
            f"{record.reason}. Skip it with --bad-samples skip, or "
            f"{self.shards.remedy(sample)}"
        )


class _RandomCrops(_Crops):
    def __init__(
        self,
        shards: Images,
        seed: int,
        crop_min: float,
        crop_max: float,
        image_size: int,
        views: int,
    ) -> None:
        super().__init__(shards, image_size)
        self.seed, self.crop_min, self.crop_max, self.views = seed, crop_min, crop_max, views

    def made(self, job: _Job) -> ViewBatch:
        views, draws = self.memory(len(job.samples.index)), self.draws(job)
        seen, bad = job.samples.index.tolist(), list[BadSample]()
        for i in range(len(seen)):
            self.crop(views[:, i], i, job, draws, seen, bad)
        return self.batch(job, job.samples, seen, views, bad)

    def memory(self, images: int) -> Tensor:
        """Allocate with channels last in memory, as resizing prefers."""
        memory = batch_memory((self.views, images, self.image_size, self.image_size, 3))
        return memory.permute(0, 1, 4, 2, 3)

    def draws(self, job: _Job) -> list[list[list[float]]]:
        """Draw CROP_SLOTS numbers for each view of each sample."""
        index, passes = job.samples
        by_view = [
            uniforms(self.seed, passes, index, view, CROP_SLOTS) for view in range(self.views)
        ]
        numbers: list[list[list[float]]] = np.stack(by_view, axis=1).tolist()
        return numbers

    def boxes(self, draws: list[list[float]], height: int, width: int) -> list[Box]:
        """Compute the box of each view of one image."""
        return [crop_box(u, height, width, self.crop_min, self.crop_max) for u in draws]

    def crop(
        self,
        views: Tensor,
        i: int,
        job: _Job,
        draws: list[list[list[float]]],
        seen: list[int],
        bad: list[BadSample],
    ) -> None:
        """Fill the views of the job's sample i, uint8 [V, 3, S, S]; record a bad one."""
        sample = seen[i]
        try:
            pixels = self.pixels(sample)
        except DecodeError as error:
            pixels, seen[i] = self.substitute(sample, int(job.samples.passes[i]), error)
            bad.append(self.bad(sample, error, seen[i]))
        for view, box in zip(views, self.boxes(draws[i], *pixels.shape[:2]), strict=True):
            write_crop(view, pixels, box)

    def substitute(self, sample: int, passes: int, error: DecodeError) -> tuple[Pixels, int]:
        """Return pixels and number of a replacement."""
        if not self.skip:
            self.bad(sample, error)
        for other in substitutes(self.seed, passes, sample, len(self.shards)):
            with contextlib.suppress(DecodeError):
                return self.pixels(other), other
        raise UserError(
            f"cannot decode the image in {self.shards.name}, {self.shards.where(sample)}: "
            f"{error}; nor any of {TRIES} others tried in its place. Is this a set of images? "
            f"{how_to_check(self.shards)}"
        )


class _EncodedCrops(_RandomCrops):
    """Leaves images that the device can decode as they are, with the boxes of their crops."""

    def made(self, job: _Job) -> ViewBatch:
        draws, seen, bad = self.draws(job), job.samples.index.tolist(), list[BadSample]()
        parts, turned, pixels, rows, boxes, others = [], [], [], [], [], []
        for i, sample in enumerate(seen):
            self.reading.begin(sample)
            data = self.shards.read(sample)
            if can_decode(data):
                parts.append(without_exif(data))
                turned.append(orientation(data))
                height, width = image_size(data)
                pixels.append(height * width)
                rows.append(i)
                boxes.append(self.boxes(draws[i], height, width))
            else:
                others.append(i)
        views = self.memory(len(others))
        for place, i in enumerate(others):
            self.crop(views[:, place], i, job, draws, seen, bad)
        encoded = batch_memory((sum(map(len, parts)),))
        encoded.numpy()[:] = np.frombuffer(b"".join(parts), np.uint8)
        whole: Any = EncodedViews(
            encoded,
            torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0),
            torch.tensor(turned, dtype=torch.int64),
            torch.tensor(pixels, dtype=torch.int64),
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(boxes, dtype=torch.int64).reshape(len(rows), self.views, 4),
            torch.tensor(others, dtype=torch.int64),
            views,
        )
        return self.batch(job, job.samples, seen, whole, bad)


def _decoded(decoder: DeviceDecoder, shards: Images, batch: ViewBatch) -> ViewBatch:
    """Decode the batch's views on the device. Raises UserError for a damaged image."""
    encoded: Any = batch.views
    try:
        return batch._replace(views=decoder(encoded))
    except BadImage as error:
        sample = int(batch.index[error.row])
        raise UserError(
            f"cannot decode the image in {shards.name}, {shards.where(sample)}: {error}. It was "
            "found on the device, when its batch was made: skip it with --decode cpu and "
            f"--bad-samples skip, or {shards.remedy(sample)}"
        ) from None


class _CentreCrops(_Crops):
    def __init__(self, shards: Images, image_size: int, resize_ratio: float) -> None:
        super().__init__(shards, image_size)
        self.resize_ratio = resize_ratio

    def made(self, job: _Job) -> ViewBatch:
        views = self.memory(len(job.samples.index))
        kept, bad = list[int](), list[BadSample]()
        for i, sample in enumerate(job.samples.index.tolist()):
            try:
                write_centre(views[0, len(kept)], self.pixels(sample), self.resize_ratio)
                kept.append(i)
            except DecodeError as error:
                bad.append(self.bad(sample, error))
        samples = Samples(*(column[kept] for column in job.samples))
        return self.batch(job, samples, samples.index.tolist(), views[:, : len(kept)], bad)
