"""Inputs of the encoders: crops on the device, the keys' exchanged between ranks, augmented.

On a CPU they are made when the step needs them, and the exchange overlaps with the first queries.
On a GPU they are made one step ahead, on a stream of their own: copy, exchange and augmentation of
step n + 1 run during step n. The numbers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from moco_scale.config.schema import Config
from moco_scale.data.images.augment import AUGMENTATIONS, draw_params
from moco_scale.data.images.device_augment import DeviceAugment, StaticAugment
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.data.sampling.order import BatchPlan, Samples
from moco_scale.distributed import collectives
from moco_scale.methods.moco import VIEWS
from moco_scale.methods.shuffle_bn import ShuffleBN
from moco_scale.models.stochastic_depth import Crops


class Inputs:
    """Makes the inputs of each step of a run.

    Args:
        config: of the run.
        plan: samples of each batch.
        shuffle: exchanges the keys' crops.
        device: of the encoders.
        ahead: make each step's inputs while the step before runs; by default on a GPU, if the
            exchange may overlap.
        overlap: the exchange may overlap with the encoders. False where these send messages too.

    Attributes:
        augmentation: the chain, with the configuration's crop.
        terms: (query view, key view) of each term of the loss; also the stream of its shuffle.
        overlap: as given.
    """

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        shuffle: ShuffleBN,
        device: torch.device,
        ahead: bool | None = None,
        overlap: bool = True,
    ) -> None:
        self.plan, self.shuffle, self.device = plan, shuffle, device
        self.terms = [(0, 1), (1, 0)] if config.contrast.symmetric else [(0, 1)]
        self.augmentation = dataclasses.replace(
            AUGMENTATIONS[config.data.aug], crop_min=config.data.crop
        )
        on_gpu = device.type == "cuda"
        self._ahead = on_gpu and overlap if ahead is None else ahead
        self.overlap = overlap
        self._stream = torch.cuda.Stream(device) if on_gpu and self._ahead else None
        self._ready: dict[int, StepInputs] = {}
        self._share = config.optim.batch_size // collectives.world_size()
        chains = [self.augmentation.of(view) for view in range(VIEWS)]
        preset = config.preset
        self._augments = [DeviceAugment(chain, preset.mean, preset.std) for chain in chains]
        # On a CPU the grouped form is several times as fast, compiled or not.
        self._compiled = [
            StaticAugment(chain, preset.mean, preset.std, compiled=True)
            for chain in chains
            if on_gpu and config.run.compile
        ]

    def ahead(self, batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
        """Yield the batches, each when the inputs of the next are being made.

        A batch read ahead and not trained on is not lost: the position in the data is the step.
        """
        if not self._ahead:
            yield from batches
            return
        self._ready.clear()
        batch = next(batches, None)
        if batch is not None:
            self._begin(batch)
        while batch is not None:
            following = next(batches, None)
            if following is not None:
                self._begin(following)
            yield batch
            batch = following

    def _begin(self, batch: ViewBatch) -> None:
        """Queue all work for a batch on the device, before the step of the batch before it.

        The work waits for earlier steps, so that it is never more than one step ahead, and their
        freed memory is reused only when they are done. All ranks start their exchanges here, in
        the same order relative to their other messages.
        """
        if self._stream is None:
            inputs = StepInputs(self, batch)
            inputs.make()
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                inputs = StepInputs(self, batch)
                inputs.make()
                inputs.made = self._stream.record_event()
        self._ready[batch.step] = inputs

    def take(self, batch: ViewBatch) -> StepInputs:
        """Return the inputs of a batch's step; the exchange of its keys' crops has started."""
        inputs = self._ready.pop(batch.step, None)
        if inputs is None:
            inputs = StepInputs(self, batch)
            if not self.overlap:
                for term in range(len(self.terms)):
                    inputs.receive(term)
            return inputs
        if inputs.made is not None:
            torch.cuda.current_stream(self.device).wait_event(inputs.made)
        return inputs

    def augmented(self, crops: Tensor, samples: Samples, view: int) -> Tensor:
        """Apply colours, blur and normalisation: uint8 [B, 3, S, S] -> float32."""
        params = draw_params(
            self.augmentation, self.plan.order.seed, samples.passes, samples.index, view
        )
        # Compile for one shape only: that of a rank's share.
        compiled = self._compiled and len(crops) == self._share
        augment = self._compiled[view] if compiled else self._augments[view]
        return augment(crops, params).contiguous(memory_format=torch.channels_last)


class StepInputs:
    """Inputs of one step on this rank; making them starts the exchange of the keys' crops."""

    made: torch.cuda.Event | None = None

    def __init__(self, inputs: Inputs, batch: ViewBatch) -> None:
        self._inputs = inputs
        plan, world = inputs.plan, collectives.world_size()
        self._batch = plan.batch(batch.step)
        self._mine = plan.share(batch.step, collectives.rank(), world)
        # Workers deliver channels last; exchanges and augmentation want planes.
        self._crops = batch.views.to(inputs.device, non_blocking=True).contiguous()
        self._sent = [
            inputs.shuffle.send(self._crops[key], batch.step, stream)
            for stream, (_, key) in enumerate(inputs.terms)
        ]
        self._queries: list[Tensor] | None = None
        self._keys: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}

    def make(self) -> None:
        """Augment all crops now."""
        self._queries = self.queries(slice(0, len(self._mine.index)))
        for term in range(len(self._sent)):
            self.receive(term)
            self._keys[term] = self.keys(term)

    def queries(self, rows: slice) -> list[Tensor]:
        """Return each term's query view of a micro-batch's rows: float32 [n, 3, S, S]."""
        if self._queries is not None:
            return [view[rows] for view in self._queries]
        samples = self._mine.part(rows.start, rows.stop)
        return [
            self._inputs.augmented(self._crops[query][rows], samples, query)
            for query, _ in self._inputs.terms
        ]

    def receive(self, term: int) -> None:
        """Wait for the crops of a term's keys, if they have not arrived yet."""
        if term not in self._keys and term not in self._received:
            self._received[term] = self._sent[term].wait()

    def keys(self, term: int) -> Tensor:
        """Return a term's key view of the samples that this rank encodes: float32 [b, 3, S, S]."""
        if term in self._keys:
            return self._keys.pop(term)
        view = self._inputs.terms[term][1]
        return self._inputs.augmented(self._received.pop(term), self._received_samples(term), view)

    def query_crops(self) -> Crops:
        """Name all crops of :meth:`queries`."""
        return self._crops_of(self._mine, *(query for query, _ in self._inputs.terms))

    def key_crops(self, term: int) -> Crops:
        """Name the crops of :meth:`keys`."""
        return self._crops_of(self._received_samples(term), self._inputs.terms[term][1])

    def _crops_of(self, samples: Samples, *views: int) -> Crops:
        return Crops(self._inputs.plan.order.seed, samples, views)

    def _received_samples(self, term: int) -> Samples:
        return Samples(*(column[self._sent[term].received] for column in self._batch))

    def gather_back(self, term: int, features: Tensor) -> Tensor:
        """Gather features of :meth:`keys` in the batch's order: [b, D] to [G, D] of all ranks."""
        return self._sent[term].gather_back(features)
