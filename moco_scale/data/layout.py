"""From the paths of a source to splits, classes and labels.

Understood are ``train/CLASS/…`` with an optional ``val/CLASS/…``, ``CLASS/…`` (all of it training
pictures), and pictures in one flat folder (training pictures without labels); each also inside
further folders that hold nothing else, as in a tar of a folder. Classes are numbered in the sorted
order of their names, as torchvision's ImageFolder does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from moco_scale.data.sources import Entry
from moco_scale.errors import UserError

UNLABELLED = -1
# The first of each that is there is taken.
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation")}
_SPLIT_NAMES = frozenset(name for names in _SPLIT_FOLDERS.values() for name in names)


# From the file names of the validation pictures to the class of each, by file name without suffix:
# its name, or its number in the sorted class names.
GroundTruth = Callable[[Sequence[str]], Mapping[str, str | int]]


class Picture(NamedTuple):
    """One picture of a split."""

    name: str  # below the split, with "/": "n01440764/n01440764_18.JPEG"
    container: str
    offset: int
    size: int
    label: int


class LeftOut(NamedTuple):
    """A picture that is not written, and why."""

    split: str
    name: str
    reason: str


@dataclass
class Listing:
    """What is to be written."""

    classes: list[str]
    splits: dict[str, list[Picture]]
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a user should know about the choice


def arrange(
    source: str,
    entries: Sequence[Entry],
    *,
    val_source: str | None = None,
    val_entries: Sequence[Entry] | None = None,
    ground_truth: GroundTruth | None = None,
    unlabelled: bool = False,
    train_only: bool = False,
    per_class: int | None = None,
) -> Listing:
    """Sort a source's pictures into splits and label them.

    val_entries: a source of its own for the validation pictures. ground_truth: gives their classes
    instead of the folders they lie in. per_class: of the training pictures, the first so many of
    each class by name.

    Raises UserError where the folders do not say which class a picture has, where validation
    pictures have a class that no training picture has, or no label where training pictures do.
    """
    found, notes = _splits(source, entries)
    if val_entries is not None:
        val_found, val_notes = _splits(str(val_source), val_entries)
        found["val"] = val_found.get("val") or val_found["train"]
        notes += val_notes
    if train_only and found.pop("val", []):
        notes.append("validation pictures are not written (--train-only)")
    listing = Listing([], {}, [], notes)
    labelled = _labelled(f"{source}: train", found["train"], unlabelled)
    if labelled:
        listing.classes = sorted({path[0] for path, _ in found["train"]})
    number = {name: i for i, name in enumerate(listing.classes)}
    listing.splits["train"] = [
        _picture(path, entry, number[path[0]] if labelled else UNLABELLED)
        for path, entry in found["train"]
    ]
    if "val" in found:
        where = f"{val_source or source}: val"
        listing.splits["val"] = _val(where, found["val"], number, ground_truth, unlabelled)
    elif ground_truth is not None and not train_only:
        raise UserError(f"There is a ground-truth file, but {source} has no validation pictures.")
    if not labelled:
        notes.append("the pictures have no labels (no class folders): no kNN, no linear evaluation")
    elif len(listing.classes) == 1:
        notes.append(f"there is only one class, {listing.classes[0]}")
    _leave_out_empty(listing)
    if per_class is not None:
        _keep_first(listing, per_class)
    return listing


_Split = list[tuple[tuple[str, ...], Entry]]  # path below the split
_Found = dict[str, _Split]


def _splits(source: str, entries: Sequence[Entry]) -> tuple[_Found, list[str]]:
    """The pictures of each split with their path below it, and notes on what is ignored."""
    paths = [tuple(entry.path.split("/")) for entry in entries]
    depth = 0  # folders that hold everything
    while (
        len({path[depth] for path in paths}) == 1
        and all(len(path) > depth + 1 for path in paths)
        and paths[0][depth] not in _SPLIT_NAMES
    ):
        depth += 1
    tops = Counter(path[depth] for path in paths if len(path) > depth + 1)
    if not _SPLIT_NAMES & tops.keys():
        return {"train": [(p[depth:], e) for p, e in zip(paths, entries, strict=True)]}, []
    found: _Found = {}
    taken = set()
    for split, names in _SPLIT_FOLDERS.items():
        folder = next((name for name in names if name in tops), None)
        if folder is not None:
            taken.add(folder)
            found[split] = [
                (p[depth + 1 :], e)
                for p, e in zip(paths, entries, strict=True)
                if p[depth] == folder and len(p) > depth + 1
            ]
    if "train" not in found:
        raise UserError(
            f"{source} has {', '.join(sorted(taken))} but no train folder. Name the folder itself "
            "as the source if its pictures are to be trained on."
        )
    ignored = {name: count for name, count in tops.items() if name not in taken}
    loose = len(paths) - tops.total()
    if loose:
        ignored["(no folder)"] = loose
    notes = [f"ignored in {source}: {name} ({_pictures(count)})" for name, count in ignored.items()]
    return found, notes


def _pictures(count: int) -> str:
    return f"{count} picture{'s' * (count != 1)}"


def _labelled(where: str, found: _Split, unlabelled: bool) -> bool:
    """Whether a split's pictures lie in class folders; UserError when only some do."""
    if unlabelled:
        return False
    loose = [path for path, _ in found if len(path) == 1]
    if loose and len(loose) < len(found):
        raise UserError(
            f"{where}: {len(loose)} pictures lie in no class folder (the first: {loose[0][0]}), "
            f"{len(found) - len(loose)} do. Move them, or take all as unlabelled (--unlabelled)."
        )
    return not loose


def _picture(path: tuple[str, ...], entry: Entry, label: int) -> Picture:
    return Picture("/".join(path), entry.container, entry.offset, entry.size, label)


def _val(
    where: str,
    found: _Split,
    number: Mapping[str, int],
    ground_truth: GroundTruth | None,
    unlabelled: bool,
) -> list[Picture]:
    """The validation pictures, labelled as the training pictures are."""
    if unlabelled or (ground_truth is None and not number):
        return [_picture(path, entry, UNLABELLED) for path, entry in found]
    if ground_truth is None and not _labelled(where, found, unlabelled):
        raise UserError(
            f"{where}: the pictures lie in no class folders, so their classes are not known. Give "
            "them with --val-ground-truth FILE, or leave the pictures out with --train-only."
        )
    labels = None if ground_truth is None else ground_truth([path[-1] for path, _ in found])
    pictures, strangers = [], Counter[str]()
    for path, entry in found:
        if labels is None:
            name: str | int = path[0]
        else:
            stem = PurePosixPath(path[-1]).stem
            if stem not in labels:
                raise UserError(f"{where}: the ground-truth file says nothing about {path[-1]}.")
            name = labels[stem]
        label = number.get(name) if isinstance(name, str) else name
        if label is None or not 0 <= label < len(number):
            strangers[str(name)] += 1
        else:
            pictures.append(_picture(path, entry, label))
    if strangers:
        raise UserError(
            f"{where}: {strangers.total()} pictures are of a class that no training picture has: "
            f"{', '.join(sorted(strangers)[:5])}{', …' if len(strangers) > 5 else ''}. "
            "Training and validation need the same class folders."
        )
    return pictures


def _leave_out_empty(listing: Listing) -> None:
    for split, pictures in listing.splits.items():
        listing.left_out += [LeftOut(split, p.name, "empty file") for p in pictures if not p.size]
        kept = [p for p in pictures if p.size]
        if not kept:
            raise UserError(f"All {len(pictures)} pictures of {split} are empty files.")
        listing.splits[split] = kept


def _keep_first(listing: Listing, per_class: int) -> None:
    if not listing.classes:
        raise UserError("--per-class needs pictures in class folders; these have no labels.")
    seen: Counter[int] = Counter()
    kept = []
    for picture in listing.splits["train"]:  # sorted by name
        seen[picture.label] += 1
        if seen[picture.label] <= per_class:
            kept.append(picture)
    listing.splits["train"] = kept
    fewer = sum(count < per_class for count in seen.values())
    if fewer:
        listing.notes.append(f"{fewer} classes have fewer than {per_class} training pictures")
