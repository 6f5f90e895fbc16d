"""Key queue (MoCo's dictionary): a ring of keys, whole on every rank or sharded over ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.methods.infonce import Contrast, Negatives, infonce
from moco_scale.utils.to_device import on_device

KINDS = ("replicated", "sharded")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Slots whose mean similarity to the queries is reported.
_PROBED = 1 << 14
# Rows drawn or rounded at once; a multiple of 16 of them continue torch's normal numbers exactly.
_PIECE = 1 << 10


class KeyQueue:
    """Ring of the newest ``length`` keys.

    Filled at first with random unit vectors (as in the official code), a function of the seed:
    ``normalize(randn(length, dim, generator=Generator().manual_seed(seed)))``. It is written in
    place and never copied. Every rank gets every key, in the order of the global batch, and stores
    those whose slots it holds: all, or, of a sharded queue, rank r of W the slots r*length//W to
    (r+1)*length//W. A key's slot depends only on the number of keys before it, so enqueueing needs
    no message.

    Args:
        length: K, slots over all ranks together.
        dim: of a key.
        seed: of the first, random keys.
        device: of the keys.
        dtype: of the storage; computation is in fp32.
        shard: (r, W): this rank's shard. (0, 1) is the whole.
        mask_unfilled: slots without a real key are no negatives.
        mask_same_image: keys of a query's own image are not its negatives.

    Attributes:
        keys: [slots of this rank, dim], unit rows.
        samples: int64, the image of each of these keys, -1 of random ones; None unless
            ``mask_same_image``.
        first: slot of this rank's first key.
        pointer: slot of the next key.
        enqueued: keys enqueued since the start of the run.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        seed: int,
        device: torch.device | str,
        *,
        dtype: torch.dtype = torch.float32,
        shard: tuple[int, int] = (0, 1),
        mask_unfilled: bool = False,
        mask_same_image: bool = False,
    ) -> None:
        self.first, end = share(length, *shard)
        self.keys = torch.empty(end - self.first, dim, dtype=dtype, device=device)
        self.samples = None
        if mask_same_image:
            self.samples = torch.full((end - self.first,), -1, device=device)
        self.sharded, self.mask_unfilled = shard[1] > 1, mask_unfilled
        self.pointer = 0
        self.enqueued = 0
        self._length = length
        self._draw(torch.Generator().manual_seed(seed))

    def _draw(self, generator: torch.Generator) -> None:
        # In pieces: a shard of a long queue must not need the memory of the whole.
        starts = list(range(0, len(self), _PIECE))
        if len(starts) > 1 and len(self) - starts[-1] < 16:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            if start >= self.first + len(self.keys):
                return
            rows = torch.randn(end - start, self.keys.shape[1], generator=generator)
            self._write(start, F.normalize(rows, dim=1), None)

    def __len__(self) -> int:
        return self._length

    @property
    def filled(self) -> int:
        """Slots that hold a real key; the others still hold random vectors."""
        return min(self.enqueued, len(self))

    @property
    def used(self) -> int:
        """Slots whose keys are negatives."""
        return self.filled if self.mask_unfilled else len(self)

    def negatives(self) -> Negatives:
        """Return this rank's negatives: a view of the ring."""
        # Real keys fill the ring from slot 0 on.
        count = min(max(self.used - self.first, 0), len(self.keys))
        samples = None if self.samples is None else self.samples[:count]
        probed = min(max(_PROBED - self.first, 0), count)
        return Negatives(self.keys[:count], samples, self.sharded, probed)

    def contrast(
        self,
        query: Tensor,
        positive: Tensor,
        temperature: float,
        samples: npt.NDArray[np.int64],
    ) -> Contrast:
        """Compute :func:`moco_scale.methods.infonce.infonce` of queries against this queue.

        With a sharded queue all ranks call it, with equally many queries.

        Args:
            query: fp32 [N, dim], unit rows.
            positive: fp32 [N, dim], unit rows.
            temperature: T.
            samples: int64 [N], the images of the queries.
        """
        images = None if self.samples is None else on_device(np.array(samples), query.device)
        return infonce(query, positive, self.negatives(), temperature, images)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, samples: npt.NDArray[np.int64] | None = None) -> None:
        """Replace the oldest keys; any number of keys, whatever the length of the queue.

        Args:
            keys: [n, dim] in the order of the global batch. When n exceeds the length, the last
                ``length`` of them remain.
            samples: int64 [n], their images; needed with ``mask_same_image``.
        """
        length, count = len(self), keys.shape[0]
        start = (self.pointer + max(count - length, 0)) % length
        newest, images = keys[-length:], None
        if self.samples is not None:
            if samples is None:
                raise ValueError("a queue with mask_same_image needs the keys' images")
            images = on_device(np.array(samples[-length:]), keys.device)
        before_end = min(newest.shape[0], length - start)
        for slot, rows in ((start, slice(0, before_end)), (0, slice(before_end, None))):
            self._write(slot, newest[rows], None if images is None else images[rows])
        self.pointer = (self.pointer + count) % length
        self.enqueued += count

    def _write(self, slot: int, keys: Tensor, samples: Tensor | None) -> None:
        """Write keys to consecutive slots, as far as this rank holds them."""
        begin = max(slot, self.first)
        end = min(slot + len(keys), self.first + len(self.keys))
        if begin >= end:
            return
        here = slice(begin - self.first, end - self.first)
        self.keys[here] = keys[begin - slot : end - slot]
        if self.samples is not None and samples is not None:
            self.samples[here] = samples[begin - slot : end - slot]

    def ages(self, keys_per_step: int) -> tuple[float, int]:
        """Mean and largest age of the real keys, in steps that moved the encoders.

        A key of the step before the next one has age 1; (0, 0) of an empty queue.
        """
        if not self.filled:
            return 0.0, 0
        whole, rest = divmod(self.filled, keys_per_step)
        total = keys_per_step * whole * (whole + 1) // 2 + rest * (whole + 1)
        return total / self.filled, whole + (rest > 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's ``keys`` and perhaps ``samples``; int64 ``pointer``, ``enqueued``."""
        state = {
            "keys": self.keys,
            "pointer": torch.tensor(self.pointer),
            "enqueued": torch.tensor(self.enqueued),
        }
        return state if self.samples is None else state | {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a :meth:`state_dict`; keys and samples are those of this rank."""
        self.keys.copy_(state["keys"])
        if self.samples is not None:
            self.samples.copy_(state["samples"])
        self.pointer = int(state["pointer"])
        self.enqueued = int(state["enqueued"])


def share(length: int, rank: int, world: int) -> tuple[int, int]:
    """Return a rank's share of ``length`` rows: first and last + 1."""
    return rank * length // world, (rank + 1) * length // world


def crowded_queue(keys: int, images: int) -> list[str]:
    """Warn where a queue of so many keys holds each image of the training set more than once."""
    if keys <= images:
        return []
    fitting = 1 << (max(images // 2, 1).bit_length() - 1)
    often = keys / images
    return [
        f"the queue's {keys:,} keys hold each of the {images:,} images about "
        f"{f'{often:,.0f}' if often >= 10 else f'{often:.2g}'} times, so that a query's negatives "
        "are views of its own image too; "
        f"--nce-k {fitting} fits such a set, or leave these out with --mask-same-image"
    ]
