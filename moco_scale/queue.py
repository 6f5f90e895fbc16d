"""The dictionary: a ring of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyQueue:
    """A ring of the newest ``length`` keys, replicated on every rank.

    Filled at first with random unit vectors (as the official code does), a function of the seed:
    ``normalize(randn(length, dim, generator=Generator().manual_seed(seed)))``. It is only ever
    written in place; nothing copies it.

    Attributes:
        keys: fp32 [length, dim], unit rows.
        pointer: the slot the next key goes to.
        enqueued: keys enqueued since the start of the run.
    """

    def __init__(self, length: int, dim: int, seed: int, device: torch.device | str) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.keys = F.normalize(torch.randn(length, dim, generator=generator), dim=1).to(device)
        self.pointer = 0
        self.enqueued = 0

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def filled(self) -> int:
        """Slots that hold a real key; the others still hold random vectors."""
        return min(self.enqueued, len(self))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys; any number of keys, whatever the length of the queue.

        Args:
            keys: [n, dim] in the order of the global batch. When n exceeds the length, the last
                ``length`` of them remain.
        """
        length, count = len(self), keys.shape[0]
        start = (self.pointer + max(count - length, 0)) % length
        newest = keys[-length:]
        before_end = min(newest.shape[0], length - start)
        self.keys[start : start + before_end] = newest[:before_end]
        self.keys[: newest.shape[0] - before_end] = newest[before_end:]
        self.pointer = (self.pointer + count) % length
        self.enqueued += count

    def state_dict(self) -> dict[str, Tensor]:
        """``keys`` (fp32 [length, dim]) and the int64 scalars ``pointer`` and ``enqueued``."""
        return {
            "keys": self.keys,
            "pointer": torch.tensor(self.pointer),
            "enqueued": torch.tensor(self.enqueued),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.keys.copy_(state["keys"])
        self.pointer = int(state["pointer"])
        self.enqueued = int(state["enqueued"])
