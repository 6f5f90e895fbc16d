"""Scan of a tar of samples, from its headers alone: nothing is decoded, nothing unpickled.

Reads the headers and about 4 KB an image, so that a shard costs a few per cent of its bytes.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from moco_scale.data.images.formats import IMAGE_SUFFIXES, is_hidden
from moco_scale.data.shards.tar_groups import Groups
from moco_scale.untrusted.limits import IMAGE_FILE, MEMBERS_OF_A_SAMPLE
from moco_scale.untrusted.tar_headers import (
    BLOCK,
    FILE,
    FOLDER,
    Member,
    NoTarError,
    TarHeaders,
    parse_header,
)
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.text import printable

_T = TypeVar("_T")

# In the order of preference, should one sample have several.
IMAGES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_WINDOW = 4096  # bytes read at once: a header, small members and the header after them
_AS_FILES = (*IMAGES, "cls")
_PATH_SHOWN = 4096
KEY_SHOWN = 1100  # characters: every byte of a name in a header, if it has to be escaped
_SUFFIXES_SHOWN = 8
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class ShardScan(NamedTuple):
    """Images of one tar, in tar order."""

    offset: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int64]
    """Class numbers, or places in `names` where labels are names; -1 = unlabelled."""
    names: list[str]
    """[] where labels are numbers."""
    without_image: int
    """Samples that hold no image."""
    odd: str = ""
    """Reason why its labels cannot be used; "": they can."""
    dotted: str = ""
    """An image whose key has a dot: its name was split at the last one; "": there is none."""
    part: str = ""
    """An image that is part of another image's sample, such as 1.mask.png; "": none."""


def scan_tar(path: Path) -> ShardScan:
    """List the images of a tar.

    As in WebDataset, consecutive members whose names differ only after the first dot are one
    sample. Where a sample then has no image but has one by the last dots of its names, the last
    dots count. A label that lies apart from its image is found by its key.

    The label is the text of a `.cls`, or the field `label`, `cls` or `class` of a `.json`: a
    number, or the name of a class. If one is neither, none is used (see `ShardScan.odd`).

    Raises:
        UserError: The file cannot be read, is compressed, truncated or no tar; a header is damaged;
            it holds no image, or a key twice; neither dot gives every sample an image.
    """
    try:
        with _Tar(path) as tar:
            return _scan(tar)
    except OSError as error:
        raise UserError(
            f"Cannot read shard {printable(path, _PATH_SHOWN)}: {open_failure(error)}."
        ) from error


def member_places(
    path: Path, file: int | None = None
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """List (offset, size) of all files in a tar, in tar order.

    Args:
        path: of the tar.
        file: its descriptor, where it is open.

    Raises:
        UserError: It is truncated or no tar, or a header is damaged.
        OSError: It cannot be read.
    """
    offset, size = array("Q"), array("Q")
    with _Tar(path, file) as tar:
        for member in tar.files():
            offset.append(member.offset)
            size.append(member.size)
    return np.array(offset, np.uint64), np.array(size, np.uint64)


def open_shard(path: Path) -> int:
    """Open a tar to read it and return the descriptor.

    Raises:
        UserError: It is a folder, a pipe or a device.
        OSError: It cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer is not waited for
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(
            f"{shard_shown(path)} is no file: a folder, a pipe or a device has its name."
        )
    return file


def shard_shown(path: Path) -> str:
    """Begin messages about a tar."""
    return f"Shard {printable(path, _PATH_SHOWN)}"


def image_key(name: str) -> str:
    """Return the key of the sample whose image has this name in the tar."""
    stem, _, suffix = name.rpartition(".")
    return name if "/" in suffix or not stem else stem


def raw_key_in(header: bytes) -> str:
    """Return the key in the header of a member; "" where there is none."""
    try:
        return image_key(parse_header(header).name)
    except ValueError:
        return ""


def key_in(header: bytes) -> str:
    """Return the key in a printable form."""
    return printable(raw_key_in(header), KEY_SHOWN)


def compressed(path: Path, start: bytes) -> str | None:
    """Describe a file that begins with these bytes; None unless it is compressed."""
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"{shard_shown(path)} is compressed. Images in it cannot be reached on their "
                "own, and they hardly become smaller: decompress it once with "
                f"`{tool} {printable(path, _PATH_SHOWN)}`."
            )
    return None


def _scan(tar: _Tar) -> ShardScan:
    groups, dots, suffixes = Groups(tar.content), _Dots(), set[str]()
    for key, sample in _samples(tar, dots):
        suffix = image_suffix(sample)
        if suffix is None and len(suffixes) < _SUFFIXES_SHOWN:
            suffixes |= set(sample)
        elif suffix is not None and not 0 < sample[suffix].size <= IMAGE_FILE:
            name, length = printable(sample[suffix].name), sample[suffix].size
            raise tar.problem(f"holds {name}, an image of {length} bytes. {_AGAIN}")
        groups.add(key, sample, suffix)
    if not len(groups):
        raise tar.no_samples()
    twice = groups.twice()
    if twice is not None:
        key = next(k for k, sample in _samples(tar, _Dots()) if any(twice(k, s) for s in sample))
        raise tar.problem(f"holds the key '{printable(key)}' twice. {_AGAIN}")
    without = groups.join()
    offset, size = groups.places()
    if not len(offset):
        found = ", ".join(printable(s, 40) for s in sorted(suffixes)[:_SUFFIXES_SHOWN])
        raise tar.problem(
            f"holds no image: its {without} samples have {found}; images end in {', '.join(IMAGES)}"
        )
    label, names = groups.labels.numbered()
    odd, own, part = groups.labels.odd, dots.own, dots.part
    scan = ShardScan(offset, size, label, names, without, odd, own, part)
    problem = dots_problem([(printable(tar.path.name), scan)])
    if problem:
        raise tar.problem(problem)
    return scan


def dots_problem(scans: Iterable[tuple[str, ShardScan]]) -> str:
    """Describe tars whose names with several dots are ambiguous; "": none."""
    own, part = "", ""
    for name, scan in scans:
        own = own or (scan.dotted and f"{scan.dotted} in {name}")
        part = part or (scan.part and f"{scan.part} in {name}")
    if not (own and part):
        return ""
    return (
        f"holds {own}, an image of its own if the last dot of its name counts, and {part}, a part "
        "of another image's sample if the first one does: what is meant cannot be told. Pack "
        "images again with one dot in each name"
    )


def image_suffix(sample: Collection[str]) -> str | None:
    """Return the suffix of a sample's image."""
    return next((suffix for suffix in IMAGES if suffix in sample), None)


def _is_dotted(suffix: str) -> bool:
    """Tell whether a name's suffix by the first dot has another dot, and is an image's after it."""
    return "." in suffix and suffix.rpartition(".")[2] in IMAGES


def by_last_dot(sample: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """Regroup {suffix: member} by the first dot to {key: {suffix: member}} by the last.

    The keys stand between the two dots.
    """
    found: dict[str, dict[str, _T]] = {}
    for suffix, member in sample.items():
        stem, _, last = suffix.rpartition(".")
        found.setdefault(stem, {})[last] = member
    return found


class _Dots:
    """Names with several dots, as in `ShardScan`."""

    own, part = "", ""


def _samples(tar: _Tar, dots: _Dots) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, {suffix: member}) of each sample: where necessary by the last dots."""
    for stem, members in _neighbours(tar):
        dotted = next((member.name for s, member in members.items() if _is_dotted(s)), "")
        if dotted and image_suffix(members) is None:
            dots.own = dots.own or printable(dotted)
            yield from _of_their_own(tar, stem, members, dotted).items()
        elif dots.own and all("." in suffix for suffix in members):  # labels apart, by last dots
            for parts in by_last_dot(members).values():
                yield image_key(next(iter(parts.values())).name), parts
        else:
            dots.part = dots.part or printable(dotted)
            yield stem, members


def _of_their_own(
    tar: _Tar, key: str, sample: dict[str, Member], image: str
) -> dict[str, dict[str, Member]]:
    """Split samples with several images by the last dots, such as photo_1.5.jpg."""
    parts = by_last_dot(sample)
    for members in parts.values():
        if image_suffix(members) is None:
            other = next(iter(members.values())).name
            raise tar.problem(
                f"holds {printable(image)} and no {printable(key)}.{IMAGES[0]} or the like: if "
                f"keys end at the first dot, the sample {printable(key)} has no image, and if "
                f"they end at the last one, {printable(other)} belongs to none. Pack it again with "
                "one dot in the names of images and of what belongs to them"
            )
    return {image_key(next(iter(m.values())).name): m for m in parts.values()}


def split_name(name: str) -> tuple[str, str]:
    """Split by the first dot: (key, suffix in lower case); "" for no suffix or hidden names."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not dot or not stem or _is_hidden(folder):
        return "", ""
    return folder + slash + stem, suffix.lower()


@functools.lru_cache(1024)
def _is_hidden(folder: str) -> bool:
    """Tell a hidden or system folder of a tar: @eaDir, __MACOSX, .AppleDouble."""
    return any(map(is_hidden, folder.split("/")))


def _neighbours(tar: _Tar) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, {suffix in lower case: member}) of neighbours with one key by first dot."""
    key, sample = "", dict[str, Member]()
    for member in tar.files():
        this, suffix = split_name(member.name)
        if not this:
            continue  # not part of any sample
        if this != key:
            if sample:
                yield key, sample
            key, sample = this, {}
        if suffix in sample:
            before, name = printable(sample[suffix].name), printable(member.name)
            if sample[suffix].name == member.name:
                raise tar.problem(f"holds {name} twice. {_AGAIN}")
            raise tar.problem(
                f"holds {name} beside {before}: names that differ in capital letters alone are one "
                "sample, which cannot be told apart. Pack it again with other names"
            )
        if len(sample) >= MEMBERS_OF_A_SAMPLE:
            raise tar.problem(
                f"holds more than {MEMBERS_OF_A_SAMPLE:,} files whose names are alike up to the "
                f"first dot, such as {printable(member.name)}: pack them to several tars"
            )
        sample[suffix] = member
    if sample:
        yield key, sample


_AGAIN = "Fetch it again, or make it again."


class _Tar:
    """Tar on a disk."""

    def __init__(self, path: Path, file: int | None = None) -> None:
        self.path = path
        self._file = open_shard(path) if file is None else os.dup(file)
        self._bytes = os.fstat(self._file).st_size
        self._start, self._window = 0, b""
        if hasattr(os, "posix_fadvise"):  # or the kernel would read the images too
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def problem(self, text: str) -> UserError:
        return UserError(f"{shard_shown(self.path)} {text}")

    def content(self, offset: int, size: int, most: int) -> bytes | None:
        """Read a small file; None: it is not small."""
        return None if size > most else self._at(offset, size)

    def files(self) -> Iterator[Member]:
        """Yield the regular files, in order."""
        if self._bytes == 0:
            raise self.problem(f"is empty: 0 bytes. {_AGAIN}")
        headers = TarHeaders(self._at, shard_shown(self.path), _AGAIN, end=self._bytes)
        try:
            for member in headers:
                suffix = member.name.rpartition(".")[2].lower()
                if member.kind == FILE:
                    yield member
                elif member.kind != FOLDER and suffix in _AS_FILES:
                    raise self.problem(
                        f"holds {printable(member.name)} as a {member.kind}, not as a file. Pack "
                        "it again; tar --dereference --hard-dereference packs what links point to."
                    )
        except NoTarError:
            message = compressed(self.path, self._at(0, BLOCK))
            if message:
                raise UserError(message) from None
            raise
        self._check_end(headers.at)

    def no_samples(self) -> UserError:
        """Explain why there are no samples."""
        names = [member.name for member in itertools.islice(self.files(), 1)]
        if not names:
            return self.problem(f"is an empty tar. {_AGAIN}")
        return self.problem(
            "holds no samples: its files have names without a suffix, or hidden ones (such as "
            f"{printable(names[0])}). Pack it again with names such as 000.jpg and 000.cls"
        )

    def _at(self, offset: int, size: int) -> bytes:
        skipped = offset - self._start
        if skipped < 0 or skipped + size > len(self._window):
            self._start, skipped = offset, 0
            self._window = os.pread(self._file, max(size, _WINDOW), offset)
        return self._window[skipped : skipped + size]

    def _check_end(self, at: int) -> None:
        """Require zeros after the last member: later content would not be read."""
        while at < self._bytes:
            part = os.pread(self._file, 1 << 20, at)
            if part.strip(b"\0"):
                raise self.problem(
                    f"goes on after its end at byte {at}: two tars in one file, or a damaged one. "
                    f"{_AGAIN}"
                )
            at += len(part)
            try:  # on to what is no hole, where the file system can tell
                at = os.lseek(self._file, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole follows
                    return
