"""Interface of a set of images for readers, evaluation and reports."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.sampling.order import Indices, Order
from moco_scale.utils.text import printable


class Place(NamedTuple):
    """Place of an image, for people."""

    shard: str
    offset: int
    key: str  # "" where the header before the image cannot be read

    def __str__(self) -> str:
        key = f" (key {printable(self.key)})" if self.key else ""
        return f"{printable(self.shard)} at byte {self.offset}{key}"


class Images(Protocol):
    """Encoded images with labels, each readable on its own, as a loader needs them.

    Can be pickled, and used after a fork.
    """

    @property
    def name(self) -> str:
        """Name of the set as the user gave it, for messages."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """int32 [N], class numbers; -1 = unlabelled."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> memoryview:
        """Return the encoded bytes of image i. Raises UserError: they have changed."""
        ...

    def where(self, i: int) -> str:
        """Name shard, byte and key of image i, for messages."""
        ...

    def place(self, i: int) -> Place:
        """Return shard, byte and key of image i."""
        ...

    def fault(self, i: int) -> str | None:
        """Describe a change of image i's file since it was indexed; None: none."""
        ...

    def remedy(self, i: int) -> str:
        """Advise, in messages, what to do about a bad image i."""
        ...

    def checkable(self) -> list[str]:
        """List the folders that `python -m moco_scale shard --check` reads."""
        ...

    def rest(self) -> None:
        """Release the batch's memory: shards may be removed now."""
        ...

    def remote_parts(self) -> list[RemotePart]:
        """List the remote parts of the set; [] when all is local."""
        ...


class Shards(Images, Protocol):
    """Images of one split."""

    @property
    def split(self) -> str: ...

    @property
    def classes(self) -> list[str]:
        """Names of the classes; [] when there are none."""
        ...

    @property
    def why_unlabelled(self) -> str:
        """Reason why existing labels cannot be used, else ""."""
        ...

    @property
    def made(self) -> dict[str, Any]:
        """Record of how the shards were made, from the index; {} for a mixture."""
        ...

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tar of the split."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of images, labels and places, which a resumed run compares."""
        ...

    def order(self, seed: int, window: int = 0) -> Order:
        """Choose the training order, in windows of so many shards; 0: of all."""
        ...

    def subset(self, indices: Indices) -> Any:
        """Select images: int64 [M] places, kept in this order."""
        ...
