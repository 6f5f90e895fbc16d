"""Several sets of images as one, and their names on the command line."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moco_scale.data.remote.addresses import is_remote, refuse_command, shown
from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.sampling.mixture import Mixture
from moco_scale.data.sampling.order import FullPermutation, Indices, Order
from moco_scale.data.shards.protocols import Place, Shards
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_WEIGHT = re.compile(r"(?P<spec>.+):(?P<weight>[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+)")
_LEAST, _MOST = 1e-9, 1e12
_HOST = re.compile(r"\w+://[^/]*")  # ":8080" after it is a port


class Named(NamedTuple):
    """Set of a mixture."""

    spec: str
    weight: float | None

    @property
    def remote(self) -> bool:
        """True for an address."""
        return is_remote(self.spec)


def split_mixture(spec: str) -> list[Named]:
    """The sets that `A:0.7,B:0.3` names; a set on its own is one of them, without a weight.

    Commas inside braces belong to a pattern. What exists under the whole name, commas and colons
    included, is that set, and so is what exists under a part's.

    Raises UserError: a command, an empty name, only some weights, a weight of 0.
    """
    refuse_command(spec)
    if not spec.strip():
        raise UserError("--data-dir is empty: name a folder of shards, or their address")
    if os.path.exists(spec):
        return [Named(spec, None)]
    # A shell expands the ~ of the first one only.
    parts = [os.path.expanduser(part.strip()) for part in re.split(r",(?![^{}]*\})", spec)]
    named = [_weighted(part) for part in parts]
    if any(not part.spec for part in named):
        raise UserError(f"--data-dir {shown(spec)}: a set without a name")
    without = [shown(part.spec) for part in named if part.weight is None]
    if without and len(without) < len(named):
        raise UserError(
            f"--data-dir {shown(spec)}: {without[0]} has no weight, others have one; give all "
            "or none (none: by the numbers of their images)"
        )
    for part in named:
        refuse_command(part.spec)
        if part.weight == 0:
            raise UserError(
                f"--data-dir {shown(spec)}: {shown(part.spec)} has weight 0; leave it out"
            )
        if part.weight is not None and not _LEAST <= part.weight <= _MOST:
            raise UserError(
                f"--data-dir {shown(spec)}: {shown(part.spec)} has weight {part.weight:g}; weights "
                f"lie between {_LEAST:g} and {_MOST:g}"
            )
    return named


def _weighted(part: str) -> Named:
    found = _WEIGHT.fullmatch(part)
    if found is None or os.path.exists(part) or _HOST.fullmatch(found["spec"]):
        return Named(part, None)
    return Named(found["spec"], float(found["weight"]))


class MixedShards:
    """Images of several sets, one set after the other.

    They are labelled when all sets have the same classes, else none is.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Shards],
        weights: Sequence[float] | None,
        selection: Indices | None = None,
    ) -> None:
        """weights: of the parts in training; None: by size. selection: places, None: all."""
        self.name, self.parts = name, tuple(parts)
        self.split = self.parts[0].split
        self.made: dict[str, Any] = {}
        self.weights = tuple(weights or [float(len(part)) for part in parts])
        self._ends = np.cumsum([len(part) for part in parts])
        self._selection = selection
        alike = all(part.classes == parts[0].classes for part in parts)
        self.classes: list[str] = parts[0].classes if alike else []
        self.why_unlabelled = next((p.why_unlabelled for p in parts if p.why_unlabelled), "")
        if not alike and not self.why_unlabelled:
            self.why_unlabelled = "the sets of the mixture have different classes"
        #: int32 [N]; -1 = unlabelled
        self.labels: npt.NDArray[np.int32]
        if not self.classes:
            self.labels = np.broadcast_to(np.int32(-1), len(self))
        else:
            labels = np.concatenate([part.labels for part in parts])
            self.labels = labels if selection is None else labels[selection]
        digest = hashlib.blake2b(digest_size=16)
        for part, weight in zip(parts, self.weights, strict=True):
            digest.update(f"{part.fingerprint} {weight / sum(self.weights):.12g}\n".encode())
        if selection is not None:
            digest.update(np.ascontiguousarray(selection, dtype="<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._selection is None else len(self._selection)

    def order(self, seed: int, window: int = 0) -> Order:
        if self._selection is not None:
            return FullPermutation(len(self), seed)
        # A seed of its own, or sets of the same size would be in the same order.
        seeds = [(seed + i) % 2**64 for i in range(len(self.parts))]
        orders = tuple(p.order(own, window) for p, own in zip(self.parts, seeds, strict=True))
        return Mixture(orders, self.weights, len(self), seed)

    def read(self, i: int) -> memoryview:
        part, place = self._locate(i)
        return part.read(place)

    def where(self, i: int) -> str:
        return str(self.place(i))

    def place(self, i: int) -> Place:
        part, place = self._locate(i)
        within = part.place(place)
        return within._replace(shard=f"{printable(part.name)}, {within.shard}")

    def fault(self, i: int) -> str | None:
        part, place = self._locate(i)
        return part.fault(place)

    def remedy(self, i: int) -> str:
        part, place = self._locate(i)
        return part.remedy(place)

    @property
    def sizes(self) -> list[int]:
        return [size for part in self.parts for size in part.sizes]

    def checkable(self) -> list[str]:
        return [folder for part in self.parts for folder in part.checkable()]

    def rest(self) -> None:
        for part in self.parts:
            part.rest()

    def remote_parts(self) -> list[RemotePart]:
        firsts = [int(end) - len(part) for part, end in zip(self.parts, self._ends, strict=True)]
        found = [
            remote._replace(first=first + remote.first)
            for first, part in zip(firsts, self.parts, strict=True)
            for remote in part.remote_parts()
        ]
        return found if self._selection is None else [p.chosen(self._selection) for p in found]

    def subset(self, indices: Indices) -> MixedShards:
        indices = np.asarray(indices, dtype=np.int64)
        chosen = indices if self._selection is None else self._selection[indices]
        return MixedShards(self.name, self.parts, self.weights, chosen)

    def _locate(self, i: int) -> tuple[Shards, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        place = i if self._selection is None else int(self._selection[i])
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self.parts[number]
        return part, place - int(self._ends[number]) + len(part)


def epoch_notes(shards: Shards, order: Order) -> list[str]:
    """Describe epochs that are not passes over one set, for the log."""
    if not isinstance(order, Mixture):
        return []
    parts = shards.parts if isinstance(shards, MixedShards) else (shards,)
    read = [
        f"{share} of the {len(part)} images in {printable(part.name)}"
        for share, part in zip(order.shares, parts, strict=True)
    ]
    return [f"an epoch reads {', '.join(read)}; the next one continues from there"]
