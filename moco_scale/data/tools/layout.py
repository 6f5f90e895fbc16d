"""Splits, classes and labels from the paths of a source.

Supported are ``train/CLASS/…`` with an optional ``val/CLASS/…``, ``CLASS/…`` (all of it training
images), and images in one flat folder (training images without labels); each also inside further
folders that hold nothing else, as in a tar of a folder. ``split_folders`` knows the names of split
folders. Classes are numbered in the sorted order of their names, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from moco_scale.data.tools.sources import Entry, Packed
from moco_scale.data.tools.split_folders import Split, images_text, split_folders
from moco_scale.untrusted.limits import CLASSES, IMAGE_FILE, LABEL_CHARACTERS
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable, some_of

UNLABELLED = -1
TOO_LARGE = f"more than {IMAGE_FILE >> 30} GB: no image"

# From the file names of the validation images to the class of each, by file name without suffix:
# its name, or its number in the sorted class names.
GroundTruth = Callable[[Sequence[str]], Mapping[str, str | int]]


class SourceImage(NamedTuple):
    """Image of a split."""

    name: str  # below the split, with "/": "n01440764/n01440764_18.JPEG"
    container: str
    offset: int
    size: int
    label: int
    packed: Packed | None = None
    problem: str = ""  # why it cannot be taken


class Skipped(NamedTuple):
    """Skipped image, and the reason."""

    split: str
    name: str
    reason: str


@dataclass
class Listing:
    """Images to write."""

    classes: list[str]
    splits: dict[str, list[SourceImage]]
    skipped: list[Skipped] = field(default_factory=list)
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
    """Sort a source's images into splits and label them.

    Args:
        source: its name.
        entries: its image files.
        val_source: name of a separate source of validation images.
        val_entries: its image files.
        ground_truth: gives the validation images' classes instead of their folders.
        unlabelled: use no labels.
        train_only: use no validation images.
        per_class: take only the first so many training images of each class, by name.

    Raises:
        UserError: Folders do not tell an image's class, or validation images have a class that no
            training image has, or no label where training images have.
    """
    found = split_folders(source, entries)
    notes = found.notes
    if "train" not in found.splits:
        raise UserError(
            f"{source} has {printable(', '.join(found.folders.values()))} but no train folder. "
            "Name the folder itself as the source if its images are to be trained on."
        )
    train = found.splits["train"]
    labelled = _labelled(f"{source}: train", train, unlabelled)
    names = {class_name(path[0]) for path, _ in train} if labelled else set()
    _refuse_classes(source, names)
    number = {name: i for i, name in enumerate(sorted(names))}
    val = found.splits.get("val")
    test = found.splits.get("test")
    if val_entries is not None:
        other = split_folders(str(val_source), val_entries)
        val = other.splits.get("val") or other.splits.get("test") or other.splits["train"]
        notes += other.notes
    elif test and not val and not train_only:
        called = f"{source}: {printable(found.folders['test'])} ({images_text(len(test))})"
        why = "" if unlabelled or ground_truth is not None else _no_val(test, number)
        notes.append(f"{called} is not used: {why}" if why else f"{called} is taken as val")
        val = None if why else test
    elif test:
        folder = printable(found.folders["test"])
        notes.append(f"ignored in {source}: {folder} ({images_text(len(test))})")
    if train_only and val:
        notes.append("validation images are not written (--train-only)")
        val = None
    listing = Listing(sorted(names), {}, [], notes)
    listing.splits["train"] = [
        _image(path, entry, number[class_name(path[0])] if labelled else UNLABELLED)
        for path, entry in train
    ]
    if val:
        where = f"{val_source or source}: val"
        listing.splits["val"] = _val(where, val, number, ground_truth, unlabelled)
    elif ground_truth is not None and not train_only:
        raise UserError(f"There is a ground-truth file, but {source} has no validation images.")
    if labelled:
        notes += _alike(p[0] for split in (train, val or []) for p, _ in split if len(p) > 1)
    if not labelled:
        notes.append("the images have no labels (no class folders): no kNN, no linear evaluation")
    elif len(listing.classes) == 1:
        notes.append(f"there is only one class, {printable(listing.classes[0], 60)}")
    _leave_out(listing)
    if per_class is not None:
        _keep_first(listing, per_class)
    return listing


@functools.lru_cache(1 << 16)
def class_name(folder: str) -> str:
    r"""Return the class of a folder's name, as valid Unicode.

    One name is one class, whether a file system spells é as one character or as two (NFC). Bytes
    that are no UTF-8 become \xe9.
    """
    raw = folder.encode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", raw.decode("utf-8", "backslashreplace"))


def _refuse_classes(source: str, names: Collection[str]) -> None:
    """Raise UserError for more classes, or longer names, than an index may hold."""
    if len(names) > CLASSES:
        raise UserError(
            f"{source} has {len(names):,} folders of classes, and {CLASSES:,} is the limit. If "
            "they are no classes, give --unlabelled."
        )
    longest = max(names, key=len, default="")
    if len(longest) > LABEL_CHARACTERS:
        raise UserError(
            f"{source} has a class whose name has {len(longest):,} letters, and "
            f"{LABEL_CHARACTERS:,} is the limit: {printable(longest, 60)}"
        )


def _alike(folders: Iterable[str]) -> list[str]:
    """Warn of folders whose names hardly differ."""
    spellings: dict[str, set[str]] = {}
    for folder in set(folders):
        spellings.setdefault(class_name(folder), set()).add(folder)
    cases: dict[str, list[str]] = {}
    for name in sorted(spellings):
        cases.setdefault(name.casefold(), []).append(name)
    several = [name for name in sorted(spellings) if len(spellings[name]) > 1]
    capitals = [
        " and ".join(printable(n, 60) for n in names) for names in cases.values() if names[1:]
    ]
    notes = []
    if several:
        notes.append(
            f"folders whose names differ in how they spell their letters (NFC, NFD) are one class: "
            f"{some_of([printable(name, 60) for name in several])}"
        )
    if capitals:
        notes.append(f"classes whose names differ in capitals alone: {some_of(capitals)}")
    return notes


def _no_val(test: Split, number: Mapping[str, int]) -> str:
    """Explain why test images cannot be used for validation; "": they can."""
    if not number:
        return ""
    if any(len(path) == 1 for path, _ in test):
        return "not all of its images lie in class folders"
    strangers = sorted({class_name(path[0]) for path, _ in test} - number.keys())
    return f"train has no class {printable(strangers[0], 60)}" if strangers else ""


def _labelled(where: str, found: Split, unlabelled: bool) -> bool:
    """Tell whether a split's images lie in class folders. Raises UserError: only some do."""
    if unlabelled:
        return False
    loose = [path for path, _ in found if len(path) == 1]
    if loose and len(loose) < len(found):
        raise UserError(
            f"{where}: {len(loose)} images lie in no class folder (the first: "
            f"{printable(loose[0][0], 60)}), {len(found) - len(loose)} do. Move them, or take all "
            "as unlabelled (--unlabelled)."
        )
    return not loose


def _image(path: tuple[str, ...], entry: Entry, label: int) -> SourceImage:
    return SourceImage(
        "/".join(path),
        entry.container,
        entry.offset,
        entry.size,
        label,
        entry.packed,
        entry.problem,
    )


def _val(
    where: str,
    found: Split,
    number: Mapping[str, int],
    ground_truth: GroundTruth | None,
    unlabelled: bool,
) -> list[SourceImage]:
    """Label the validation images as the training images are."""
    if unlabelled or (ground_truth is None and not number):
        return [_image(path, entry, UNLABELLED) for path, entry in found]
    if ground_truth is None and not _labelled(where, found, unlabelled):
        raise UserError(
            f"{where}: the images lie in no class folders, so their classes are not known. Give "
            "them with --val-ground-truth FILE, or leave the images out with --train-only."
        )
    labels = None
    if ground_truth is not None:
        _refuse_same_names(where, found)
        labels = ground_truth([path[-1] for path, _ in found])
    images, strangers = [], Counter[str]()
    for path, entry in found:
        if labels is None:
            name: str | int = path[0]
        else:
            stem = image_stem(path[-1])
            if stem not in labels:
                raise UserError(
                    f"{where}: the ground-truth file says nothing about {printable(path[-1])}."
                )
            name = labels[stem]
        label = number.get(class_name(name)) if isinstance(name, str) else name
        if label is None or not 0 <= label < len(number):
            strangers[str(name)] += 1
        else:
            images.append(_image(path, entry, label))
    if strangers:
        shown = some_of([printable(name, 60) for name in sorted(strangers)])
        cases = {name.casefold(): name for name in number}
        same = next((cases[s.casefold()] for s in strangers if s.casefold() in cases), "")
        raise UserError(
            f"{where}: {strangers.total()} images are of a class that no training image has: "
            f"{shown}"
            + (f" (there is {printable(same, 60)}: capitals count)" if same else "")
            + ". Training and validation need the same class folders; --train-only leaves "
            "validation out."
        )
    return images


def image_stem(name: str) -> str:
    """Return an image's name without folder and suffix, spelled as by `class_name`."""
    return class_name(PurePosixPath(name).stem)


def _refuse_same_names(where: str, found: Split) -> None:
    """Raise UserError where a list of names could mean several images."""
    counts = Counter(image_stem(path[-1]) for path, _ in found)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UserError(
            f"{where}: {len(twice)} names are those of several images, such as "
            f"{printable(twice[0], 60)}, so a ground-truth file cannot tell these apart. Rename "
            "them."
        )


def _leave_out(listing: Listing) -> None:
    for split, images in listing.splits.items():
        out = [Skipped(split, p.name, _problem(p)) for p in images if _problem(p)]
        listing.skipped += out
        kept = [p for p in images if not _problem(p)]
        if not kept:
            raise none_left(split, len(images), out)
        listing.splits[split] = kept


def _problem(image: SourceImage) -> str:
    if image.problem:
        return image.problem
    return TOO_LARGE if image.size > IMAGE_FILE else "" if image.size else "empty file"


def none_left(split: str, count: int, skipped: Sequence[Skipped]) -> UserError:
    """Make the error of a split without usable images."""
    reasons = Counter(entry.reason for entry in skipped if entry.split == split).most_common(3)
    why = "; ".join(f"{number} x {printable(reason)}" for reason, number in reasons)
    return UserError(f"None of the {count} {split} images can be used: {why}.")


def _keep_first(listing: Listing, per_class: int) -> None:
    if not listing.classes:
        raise UserError("--per-class needs images in class folders; these have no labels.")
    seen: Counter[int] = Counter()
    kept = []
    for image in listing.splits["train"]:  # sorted by name
        seen[image.label] += 1
        if seen[image.label] <= per_class:
            kept.append(image)
    listing.splits["train"] = kept
    fewer = sum(count < per_class for count in seen.values())
    if fewer:
        listing.notes.append(f"{fewer} classes have fewer than {per_class} training images")
