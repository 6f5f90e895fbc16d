"""Split folders of a source: train, val and test under their usual names.

A folder whose whole name is ``train`` or ``training``; ``val``, ``valid``, ``validation`` or
``dev``; ``test`` or ``testing``, in capitals or not. Where every folder has such a word in its name
(``train2017``, ``val_images``), these are splits too. A name that could be a class is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from moco_scale.data.shards.shard_list import SPLIT_WORDS
from moco_scale.data.tools.sources import Entry
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

Split = list[tuple[tuple[str, ...], Entry]]
"""Images with their path below the split."""
_WORD = re.compile(r"[a-z]+")
_SHOWN = 3


class Splits(NamedTuple):
    """Splits of a source."""

    splits: dict[str, Split]
    """Existing ones of "train", "val" and "test"."""
    folders: dict[str, str]
    """The name of the folder of each; {} where all is train."""
    notes: list[str]


def split_folders(source: str, entries: Sequence[Entry]) -> Splits:
    """Sort a source's images into its splits; all are "train" where no folder is one.

    Raises:
        UserError: Two folders mean the same split, or one may be a split or a class.
    """
    paths = [tuple(entry.path.split("/")) for entry in entries]
    depth = 0  # folders that hold everything
    while (
        len({path[depth] for path in paths}) == 1
        and all(len(path) > depth + 1 for path in paths)
        and paths[0][depth].casefold() not in SPLIT_WORDS
    ):
        depth += 1
    tops = Counter(path[depth] for path in paths if len(path) > depth + 1)
    loose = len(paths) - tops.total()
    meant = _meant(source, tops, loose)
    if not meant:
        every = [(path[depth:], entry) for path, entry in zip(paths, entries, strict=True)]
        return Splits({"train": every}, {}, [])
    deep = {path[depth] for path in paths if len(path) > depth + 2}  # they hold folders
    others = tops.keys() - meant.keys()
    if others and not deep:
        raise UserError(
            f"{source} has {_named(meant)} beside {_named(others)}, and images lie directly in "
            "all of them: a split, or a class of that name? If it is a class, put the folders "
            f"of all classes into a new folder called train; if not, name {_named(meant)} alone "
            "as the source, or move the others away."
        )
    found: dict[str, Split] = {}
    for path, entry in zip(paths, entries, strict=True):
        split = meant.get(path[depth]) if len(path) > depth + 1 else None
        if split is not None:
            found.setdefault(split, []).append((path[depth + 1 :], entry))
    ignored = {printable(name, 60): tops[name] for name in sorted(others)}
    if loose:
        ignored["(no folder)"] = loose
    notes = [f"{printable(f)} is taken as {s}" for f, s in meant.items() if f != s and s != "test"]
    notes += [f"ignored in {source}: {name} ({images_text(n)})" for name, n in ignored.items()]
    found = {split: _unwrapped(split, images_of) for split, images_of in found.items()}
    return Splits(found, {split: folder for folder, split in meant.items()}, notes)


def _meant(source: str, tops: Collection[str], loose: int) -> dict[str, str]:
    """Return the split that a folder's name means."""
    meant = {name: SPLIT_WORDS[name.casefold()] for name in tops if name.casefold() in SPLIT_WORDS}
    if not meant and len(tops) > 1 and not loose:
        words = {name: _by_word(name) for name in tops}
        if all(words.values()) and "train" in words.values() and len(set(words.values())) > 1:
            meant = words
    for split in set(meant.values()):
        same = [name for name in meant if meant[name] == split]
        if len(same) > 1:
            raise UserError(
                f"{source} has {_named(same)}, which both mean {split}. Put them together, or "
                "name one of them as --source or --val-source."
            )
    return dict(sorted(meant.items()))


def _unwrapped(split: str, found: Split) -> Split:
    """Unwrap a split from a folder of its own name, as archives are often unpacked."""
    first = found[0][0][0]
    twice = all(len(path) > 1 and path[0] == first for path, _ in found)
    if not twice or SPLIT_WORDS.get(first.casefold()) != split:
        return found
    return [(path[1:], entry) for path, entry in found]


def _by_word(name: str) -> str:
    words = (SPLIT_WORDS.get(word, "") for word in _WORD.findall(name.casefold()))
    return next(filter(None, words), "")


def _named(names: Collection[str]) -> str:
    shown = [printable(name, 60) for name in sorted(names)]
    return " and ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def images_text(count: int) -> str:
    """Write a number of images in words."""
    return f"{count} image{'s' * (count != 1)}"
