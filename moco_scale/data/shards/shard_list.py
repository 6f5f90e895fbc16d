"""List of a data set's tars without an index: folders, patterns, splits by name."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moco_scale.data.shards.index_file import INDEX_JSON
from moco_scale.untrusted.limits import TARS_OF_A_PATTERN
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.text import printable

JOIN = "::"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
_UNPACK = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Split by a word in the name of a tar or a folder, in capitals or not."""
_WORD = re.compile(r"[a-z]+")


class ShardList(NamedTuple):
    """Tars without an index."""

    folder: Path
    """Folder of the first tar; an index goes there if possible."""
    splits: dict[str, list[str]]
    """Their paths below the folder (or beside it, with ".."), in the order of the samples."""


def is_pattern(spec: str) -> bool:
    """Tell whether spec is a pattern of tars. An existing path is no pattern."""
    return any(sign in spec for sign in (JOIN, "{", "*", "?", "[")) and not os.path.exists(spec)


def list_shards(spec: str) -> ShardList | None:
    """List the tars of a folder, a file or a pattern; None when there are none.

    A file is a single tar. A folder: its `*.tar`, or those of its sub-folders. A pattern: braces
    `{000000..001281}` and `{a,b}`, `*`, `?` and `[…]`, and several of these or folders joined by
    `::`. The order is that of the names, in a folder and for `*`, and as written for braces and
    `::`.

    Splits are recognised by words in the names (`train`, `val` or `validation`, `test`), first of
    the file, then of its folder; where none has such a word, all are `train`.

    Raises:
        UserError: A file named by braces is missing, tars are compressed, a tar is named twice, or
            only some names have a split.
    """
    if is_pattern(spec):
        paths = [path for part in spec.split(JOIN) for path in _named_by(part)]
    else:
        paths = [Path(spec)] if os.path.isfile(spec) else _in_folder(Path(spec))
    if not paths:
        return None
    for path in paths:
        if COMPRESSED_TAR.search(path.name):
            raise _refuse_compressed(path)
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if len(set(absolute)) < len(absolute):
        twice = next(p for i, p in enumerate(absolute) if p in absolute[:i])
        raise UserError(f"{spec} names {twice} twice")
    folder = Path(os.path.abspath(spec)) if os.path.isdir(spec) else absolute[0].parent
    splits: dict[str, list[str]] = {}
    for split, path in zip(splits_of(spec, absolute, folder), absolute, strict=True):
        splits.setdefault(split, []).append(os.path.relpath(path, folder))
    return ShardList(folder, splits)


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as a shell does: `{08..10}` is 08, 09, 10.

    Raises:
        UserError: A brace is not closed, a range runs backwards, or there are more names than a
            data set can have tars.
    """
    choices: list[Sequence[str]] = []
    end, count = 0, 1
    for found in _BRACES.finditer(pattern):
        choices += [(pattern[end : found.start()],), _choice(pattern, found)]
        end, count = found.end(), count * len(choices[-1])
        if count > TARS_OF_A_PATTERN:
            raise _too_many(pattern)
    choices.append((pattern[end:],))
    if any(sign in text for (text,) in choices[::2] for sign in "{}"):
        raise UserError(f"{printable(pattern)}: a brace without its other half")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choice(pattern: str, braces: re.Match[str]) -> list[str]:
    """Expand one pair of braces."""
    numbers = _RANGE.fullmatch(braces.group(1))
    if not numbers:
        return braces.group(1).split(",")
    first, last = numbers.groups()
    if int(first) > int(last):
        raise UserError(f"{printable(pattern)}: the range {braces.group()} runs backwards")
    if int(last) - int(first) >= TARS_OF_A_PATTERN:
        raise _too_many(pattern)
    width = len(first) if len(first) == len(last) or first.startswith("0") else 0
    return [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]


def _too_many(pattern: str) -> UserError:
    return UserError(
        f"{printable(pattern)} stands for more than {TARS_OF_A_PATTERN:,} names: make it narrower"
    )


def _named_by(pattern: str) -> Iterator[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        yield from _in_folder(Path(pattern))
        return
    names = [pattern] if os.path.exists(pattern) else expand_braces(pattern)
    missing = []
    for name in names:
        if os.path.exists(name):
            yield Path(name)
        elif any(sign in name for sign in "*?["):
            matches = sorted(glob.glob(name))
            if not matches:
                missing.append(name)
            yield from map(Path, matches)
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{pattern} names {len(names)} shards, of which {len(missing)} are missing, such as "
            f"{missing[0]}"
        )


def _in_folder(folder: Path) -> list[Path]:
    """List the tars of a folder, or, if it has none, those of its sub-folders."""
    found = _tars(folder)
    if found or not folder.is_dir():
        return found
    below = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    # One with an index is a data set of its own.
    return [tar for child in below if not (child / INDEX_JSON).exists() for tar in _tars(child)]


def _tars(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except NotADirectoryError:
        return []
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"Cannot read {folder}: {open_failure(error)}.") from error
    # ImageNet's own tars hold tars and images of all kinds, and no samples.
    return [
        folder / name
        for name in names
        if (name.lower().endswith(".tar") or COMPRESSED_TAR.search(name))
        and not name.startswith((".", "ILSVRC2012_"))
    ]


def _refuse_compressed(path: Path) -> UserError:
    tool = _UNPACK.get(path.name.rpartition(".")[2].lower(), "tar")
    return UserError(
        f"{path} is compressed: images in it cannot be reached on their own, and they hardly "
        f"become smaller. Decompress it and its like once, for example with `{tool} {path}`; "
        "tars of images need no compression."
    )


def splits_of(spec: str, paths: list[Path], folder: Path) -> list[str]:
    """Find the split of each tar, by words in its name; see `list_shards`. Raises UserError."""
    told = [_split_of(path, folder) for path in paths]
    untold = [path for path, split in zip(paths, told, strict=True) if split is None]
    if len(untold) == len(paths):
        return ["train"] * len(paths)
    if untold:
        other = next(path for path, split in zip(paths, told, strict=True) if split is not None)
        raise UserError(
            f"{spec}: the name of {other} says which split it belongs to, that of {untold[0]} "
            f"({len(untold)} such) does not. Name the tars alike, or choose some by a pattern, "
            f"such as '{folder}/train-*.tar'."
        )
    return [split for split in told if split is not None]


def _split_of(path: Path, folder: Path) -> str | None:
    below = os.path.relpath(path.parent, folder)
    for name in (path.name, "" if below.startswith("..") else below):
        for word in _WORD.findall(name.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
