"""What readers, evaluation and reports need of a set of images, wherever it lies."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.sampling.order import Indices, Order
from moco_scale.utils.text import printable


class Place(NamedTuple):
    """Where an image lies, for people."""

    shard: str
    offset: int
    key: str  # "" where the header before the image cannot be read

    def __str__(self) -> str:
        key = f" (key {printable(self.key)})" if self.key else ""
        return f"{printable(self.shard)} at byte {self.offset}{key}"


class Images(Protocol):
    """Encoded images with labels, each readable on its own: what a loader needs.

    Can be pickled, and used after a fork.
    """

    @property
    def name(self) -> str:
        """Where they lie, as the user said it; for messages."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """int32 [N], class numbers; -1 = unlabelled."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> memoryview:
        """The encoded bytes of image i; UserError when they are no longer what they were."""
        ...

    def where(self, i: int) -> str:
        """Shard, byte and key of image i; for messages."""
        ...

    def place(self, i: int) -> Place:
        """The same in its parts."""
        ...

    def fault(self, i: int) -> str | None:
        """What has happened to the file of image i since it was indexed; None: nothing."""
        ...

    def remedy(self, i: int) -> str:
        """What the user can do about image i, should it be bad; for messages."""
        ...

    def checkable(self) -> list[str]:
        """The folders of them that `python -m moco_scale shard --check` reads."""
        ...

    def rest(self) -> None:
        """A batch is done, and what was read for it dropped: shards may be removed."""
        ...

    def remote_parts(self) -> list[RemotePart]:
        """What of them has to be fetched; [] when all are at hand."""
        ...


class Shards(Images, Protocol):
    """The images of one split."""

    @property
    def split(self) -> str: ...

    @property
    def classes(self) -> list[str]:
        """Names of the classes; [] when there are none."""
        ...

    @property
    def why_unlabelled(self) -> str:
        """Why labels that there are cannot be used; "": they can, or there are none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs where images, labels or their places differ: a resumed run checks it."""
        ...

    def order(self, seed: int, window: int = 0) -> Order:
        """The order in which training reads them, in windows of so many shards; 0: of all."""
        ...

    def subset(self, indices: Indices) -> Any:
        """The same (Shards) for some of the images: int64 [M] places, kept in this order."""
        ...
