"""What the encoders see: crops on the device, the key's exchanged among the ranks, augmented.

On a CPU each is made when the step asks for it, and the exchange is under way during the first
queries. On a GPU all of it is made one step ahead, on a stream of its own: copy, exchange and
augmentation of step n + 1 run beside step n. The numbers are the same.
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


class Inputs:
    """Makes the inputs of each step of a run.

    Args:
        config: of the run.
        plan: which samples are in its batches.
        shuffle: exchanges the keys' crops.
        device: where the encoders are.
        ahead: make each step's inputs while the step before runs; by default on a GPU, unless
            the exchange is to be alone.
        alone: no exchange is under way while the encoders run, which may send messages themselves.

    Attributes:
        augmentation: the chain, with the crop that the configuration asks for.
        terms: (query view, key view) of each term of the loss; also the stream of its shuffle.
        alone: as given.
    """

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        shuffle: ShuffleBN,
        device: torch.device,
        ahead: bool | None = None,
        alone: bool = False,
    ) -> None:
        self.plan, self.shuffle, self.device = plan, shuffle, device
        self.terms = [(0, 1), (1, 0)] if config.contrast.symmetric else [(0, 1)]
        self.augmentation = dataclasses.replace(
            AUGMENTATIONS[config.data.aug], crop_min=config.data.crop
        )
        on_gpu = device.type == "cuda"
        self._ahead = on_gpu and not alone if ahead is None else ahead
        self.alone = alone
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
        """The same batches; each comes when the inputs of the one after it are being made.

        A batch that was read and not trained on is not consumed: the position in the data is the
        step.
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
        """Give the device all work for one batch; called before the step of the batch before it.

        The work waits for the steps before that, so that it is never more than one step ahead, and
        memory that those have given back is used again only when they are done with it. All ranks
        start their exchanges here, at the same place among their other messages.
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
        """The inputs of a batch's step, whose keys' crops are on their way at least."""
        inputs = self._ready.pop(batch.step, None)
        if inputs is None:
            inputs = StepInputs(self, batch)
            if self.alone:
                for term in range(len(self.terms)):
                    inputs.receive(term)
            return inputs
        if inputs.made is not None:
            torch.cuda.current_stream(self.device).wait_event(inputs.made)
        return inputs

    def augmented(self, crops: Tensor, samples: Samples, view: int) -> Tensor:
        """Colours, blur and normalisation: uint8 [B, 3, S, S] -> float32, by sample and view."""
        params = draw_params(
            self.augmentation, self.plan.order.seed, samples.passes, samples.index, view
        )
        # One shape is worth compiling: that of a rank's share.
        compiled = self._compiled and len(crops) == self._share
        augment = self._compiled[view] if compiled else self._augments[view]
        return augment(crops, params).contiguous(memory_format=torch.channels_last)


class StepInputs:
    """The inputs of one step on this rank; making one starts the exchange of the keys' crops."""

    made: torch.cuda.Event | None = None

    def __init__(self, inputs: Inputs, batch: ViewBatch) -> None:
        self._inputs = inputs
        plan, world = inputs.plan, collectives.world_size()
        self._batch = plan.batch(batch.step)
        self._mine = plan.share(batch.step, collectives.rank(), world)
        # The workers have a pixel's colours together; exchanges and augmentation want planes.
        self._crops = batch.views.to(inputs.device, non_blocking=True).contiguous()
        self._sent = [
            inputs.shuffle.send(self._crops[key], batch.step, stream)
            for stream, (_, key) in enumerate(inputs.terms)
        ]
        self._queries: list[Tensor] | None = None
        self._keys: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}

    def make(self) -> None:
        """Augment everything now."""
        self._queries = self.queries(slice(0, len(self._mine.index)))
        for term in range(len(self._sent)):
            self.receive(term)
            self._keys[term] = self.keys(term)

    def queries(self, rows: slice) -> list[Tensor]:
        """Each term's query view of some rows of this rank's share: float32 [n, 3, S, S]."""
        if self._queries is not None:
            return [view[rows] for view in self._queries]
        samples = self._mine.part(rows.start, rows.stop)
        return [
            self._inputs.augmented(self._crops[query][rows], samples, query)
            for query, _ in self._inputs.terms
        ]

    def receive(self, term: int) -> None:
        """Wait for the crops of a term's keys, where they have not arrived yet."""
        if term not in self._keys and term not in self._received:
            self._received[term] = self._sent[term].wait()

    def keys(self, term: int) -> Tensor:
        """A term's key view, of the samples that this rank encodes: float32 [b, 3, S, S]."""
        if term in self._keys:
            return self._keys.pop(term)
        samples = Samples(*(column[self._sent[term].received] for column in self._batch))
        view = self._inputs.terms[term][1]
        return self._inputs.augmented(self._received.pop(term), samples, view)

    def gather_back(self, term: int, features: Tensor) -> Tensor:
        """[b, D] features of :meth:`keys` -> [G, D] of all ranks, in the order of the batch."""
        return self._sent[term].gather_back(features)
