"""Samples of one tar as columns of numbers, grouped by key.

Members of a sample are neighbours in WebDataset's tars. Some writers put all images first and all
labels after them: these are found by the key.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from moco_scale.data.shards.tar_labels import LABEL_SUFFIXES, TarLabels
from moco_scale.untrusted.tar_headers import Member

Content = Callable[[int, int, int], bytes | None]
"""(offset, size, most) to what is in a member; None: more bytes than `most`."""


class Groups:
    """Neighbouring members with one key, in tar order.

    Keys are kept as hashes: of a tar of five million small files all columns take 250 MB.

    Attributes:
        labels: of the groups with an image.
    """

    def __init__(self, content: Content) -> None:
        self._content, self.labels = content, TarLabels()
        self._key, self._name = array("q"), array("q")  # hashes of keys, of (key, suffix)
        self._offset, self._size = array("Q"), array("Q")  # of the image; 0: there is none
        # Which of LABEL_SUFFIXES has the label, the better the higher; 0: none has.
        self._rank, self._label_at, self._label_size = array("B"), array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._key)

    def add(self, key: str, sample: Mapping[str, Member], suffix: str | None) -> None:
        """Add a group.

        Args:
            key: of the group.
            sample: its members by suffix.
            suffix: of its image; None: it has none.
        """
        self._key.append(hash(key))
        self._name.extend(hash((key, each)) for each in sample)
        label = next((each for each in LABEL_SUFFIXES if each in sample), None)
        member = sample[label] if label is not None else None
        self._rank.append(0 if label is None else len(LABEL_SUFFIXES) - LABEL_SUFFIXES.index(label))
        self._label_at.append(member.offset if member else 0)
        self._label_size.append(member.size if member else 0)
        self._offset.append(sample[suffix].offset if suffix is not None else 0)
        self._size.append(sample[suffix].size if suffix is not None else 0)
        if suffix is not None:
            self.labels.add_none()
            if member is not None:
                self._read(len(self) - 1, len(self.labels) - 1, member.name)

    def places(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Return (offset, size) of the images, in tar order."""
        offset, size = np.array(self._offset, np.uint64), np.array(self._size, np.uint32)
        return offset[offset > 0], size[offset > 0]

    def twice(self) -> Callable[[str, str], bool] | None:
        """Describe a duplicate (key, suffix), or a key with images at two places; None: none."""
        again = _first_again(np.array(self._name, np.int64))
        if again is not None:
            return lambda key, suffix: hash((key, suffix)) == again
        again = _first_again(np.array(self._key, np.int64)[np.array(self._offset) > 0])
        if again is not None:
            return lambda key, _: hash(key) == again
        return None

    def join(self) -> int:
        """Give images the labels that lie apart from them; return the number of keys without.

        Call it only when nothing is there `twice`.
        """
        keys, has = np.array(self._key, np.int64), np.array(self._offset, np.uint64) > 0
        apart = np.flatnonzero(~has & np.isin(keys, keys[has]))
        if len(apart):
            groups = np.flatnonzero(has)
            wanted = np.flatnonzero(np.isin(keys[has], keys[apart]))
            number = dict(zip(keys[groups[wanted]].tolist(), wanted.tolist(), strict=True))
            best = {n: self._rank[group] for n, group in enumerate(groups.tolist())}
            for group in apart.tolist():
                image = number[self._key[group]]
                if self._rank[group] > best[image]:
                    best[image] = self._rank[group]
                    self._read(group, image, f"the label at byte {self._label_at[group]}")
        return len(np.unique(keys)) - int(has.sum())

    def _read(self, group: int, image: int, member: str) -> None:
        """Read the label of a group, as that of an image."""
        suffix = LABEL_SUFFIXES[len(LABEL_SUFFIXES) - self._rank[group]]
        place = self._label_at[group], self._label_size[group]
        self.labels.read(image, member, suffix, lambda most: self._content(*place, most))


def _first_again(hashes: npt.NDArray[np.int64]) -> int | None:
    """Find a value that occurs more than once."""
    ordered = np.sort(hashes)
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    return int(ordered[again[0]]) if len(again) else None
