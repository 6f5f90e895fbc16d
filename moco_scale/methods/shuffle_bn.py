"""ShuffleBN: each key is normalised among other samples than its query (He et al. 2020, 3.3).

Only the B crops that a rank encodes travel to it, as uint8, by all-to-all; one all-gather of key
features then restores the order and brings every key to every queue.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from moco_scale.data.sampling.random import permutation
from moco_scale.distributed import collectives
from moco_scale.utils.to_device import on_device

MODES = ("world", "node", "off")


class ShuffleBN:
    """Exchange of key crops between ranks.

    The permutation of a step is ``permutation(batch_size, seed, f"shuffle-{stream}", step)``: a
    function of the seed and the step over the global batch, whatever the number of ranks. Under
    ``"node"`` each of the batch's n groups of consecutive samples has its own: group i that of
    number ``step * n + i``. A group inside one node sends nothing across nodes.

    Args:
        batch_size: G, samples of the global batch; the number of ranks divides it.
        seed: of the run.
        mode: ``"world"``, ``"node"``, or ``"off"`` (no exchange, order kept).
        group: of ``"node"``: samples that are shuffled among themselves; divides G.
    """

    def __init__(self, batch_size: int, seed: int, mode: str = "world", group: int = 0) -> None:
        self.batch_size, self.seed, self.mode = batch_size, seed, mode
        self.group = group if mode == "node" else batch_size
        self.per_rank = batch_size // collectives.world_size()

    def permutation(self, step: int, stream: int = 0) -> np.ndarray:
        """Return int64 [G]: the sample of the global batch at each shuffled position."""
        if self.mode == "off":
            return np.arange(self.batch_size)
        groups, name = self.batch_size // self.group, f"shuffle-{stream}"
        return np.concatenate(
            [
                i * self.group + permutation(self.group, self.seed, name, step * groups + i)
                for i in range(groups)
            ]
        )

    def send(self, crops: Tensor, step: int, stream: int = 0) -> Exchange:
        """Start sending this rank's crops to where they will be encoded.

        Args:
            crops: [B, ...], this rank's contiguous slice of the global batch.
            step: of the run.
            stream: several exchanges of one step (a symmetric loss) have their own permutations.
        """
        return Exchange(self.permutation(step, stream), crops, keep_order=self.mode == "off")


class Exchange:
    """Exchange of one step's crops under way, and the return of their features.

    Attributes:
        received: int64 [B], positions in the global batch of the crops this rank gets.
    """

    def __init__(self, order: np.ndarray, crops: Tensor, keep_order: bool) -> None:
        rank, per_rank = collectives.rank(), crops.shape[0]
        world = collectives.world_size()
        self._order, self._keep_order = order, keep_order
        self._restore: Tensor | None = None
        self.received = order[rank * per_rank : (rank + 1) * per_rank]
        if keep_order:
            self._pending = collectives.PendingRows(crops, None, None)
            return
        owner = order // per_rank
        if np.array_equal(owner, np.arange(len(order)) // per_rank):
            # The same on every rank: nobody sends anything.
            stay = on_device(self.received - rank * per_rank, crops.device)
            self._pending = collectives.PendingRows(crops.index_select(0, stay), None, None)
            return
        # Packed by destination, and for one destination in the order of its positions.
        positions = np.flatnonzero(owner == rank)
        outgoing = order[positions] - rank * per_rank
        send_counts = np.bincount(positions // per_rank, minlength=world)
        receive_counts = np.bincount(self.received // per_rank, minlength=world)
        arrival = np.argsort(self.received // per_rank, kind="stable")
        self._restore = on_device(np.argsort(arrival, kind="stable"), crops.device)
        # index_select copies whole crops; indexing would go byte by byte on a CPU.
        packed = crops.index_select(0, on_device(outgoing, crops.device))
        self._pending = collectives.start_exchange_rows(
            packed, send_counts.tolist(), receive_counts.tolist()
        )

    def wait(self) -> Tensor:
        """Return [B, ...]: the crops this rank encodes, in shuffled order; called once."""
        crops = self._pending.wait()
        return crops if self._restore is None else crops.index_select(0, self._restore)

    def gather_back(self, features: Tensor) -> Tensor:
        """Gather features of :meth:`wait`'s crops in global order: [B, D] to [G, D]."""
        gathered = collectives.all_gather_rows(features)
        if self._keep_order:
            return gathered
        return gathered.index_select(0, on_device(np.argsort(self._order), features.device))
