"""What a tar of samples holds, from its headers alone: nothing is decoded, nothing unpickled.

Reads the headers of ustar, GNU and pax archives and about 4 KB a picture, so that a shard costs a
few per cent of its bytes. tarfile, which can do more, is ten times slower and takes a damaged
header for the end of the archive.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from moco_scale.data.sources import PICTURE_SUFFIXES
from moco_scale.data.tar_labels import TarLabels
from moco_scale.errors import UserError

_T = TypeVar("_T")

BLOCK = tarfile.BLOCKSIZE
# In the order of preference, should one sample have several.
PICTURES = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
_WINDOW = 4096  # bytes read at once: a header, small members and the header after them
_LARGEST_TEXT = 1 << 24
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class ShardScan(NamedTuple):
    """The pictures of one tar, in its order."""

    offset: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int64]
    """Class numbers, or places in `names` where labels are names; -1 = unlabelled."""
    names: list[str]
    """[] where labels are numbers."""
    without_picture: int
    """Samples that hold no picture."""
    odd: str = ""
    """What it holds that makes its labels useless; "": nothing."""
    dotted: str = ""
    """A picture whose key has a dot: its name was split at the last one; "": there is none."""
    part: str = ""
    """A picture that is part of another picture's sample, such as 1.mask.png; "": none."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def scan_tar(path: Path) -> ShardScan:
    """List the pictures of a tar: consecutive members whose names differ in what follows the first
    dot are one sample, as WebDataset has it. Where that leaves no picture to a sample that has
    some by the last dots of their names, the last dots count.

    The label is the text of a `.cls`, or the field `label`, `cls` or `class` of a `.json`: a
    number, or the name of a class. With one that is neither, none is used (see `ShardScan.odd`).

    Raises UserError: the file cannot be read, is compressed, truncated or no tar; a header is
    damaged; it holds no picture, or a key twice; neither dot gives every sample a picture.
    """
    try:
        with _Tar(path) as tar:
            return _scan(tar)
    except OSError as error:
        raise UserError(f"Cannot read shard {path}: {error.strerror or error}.") from error


def member_places(path: Path, file: int | None = None) -> set[tuple[int, int]]:
    """(offset, size) of each file in a tar, whatever it is.

    file: its descriptor, where it is open. Raises UserError as `scan_tar` does: it is truncated or
    no tar; a header is damaged. Raises OSError: it cannot be read.
    """
    with _Tar(path, file) as tar:
        return {(member.offset, member.size) for member in tar.members()}


def picture_key(name: str) -> str:
    """The key of the sample whose picture has this name in the tar."""
    stem, _, suffix = name.rpartition(".")
    return name if "/" in suffix or not stem else stem


def key_in(header: bytes) -> str:
    """The same from the header of its member; "" where that is none."""
    try:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.TarError:
        return ""
    return picture_key(name)


def compressed(path: Path, start: bytes) -> str | None:
    """What to say about a file that begins with these bytes, None unless it is compressed."""
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"Shard {path} is compressed. Pictures in it cannot be reached on their own, and "
                f"they hardly become smaller: decompress it once with `{tool} {path}`."
            )
    return None


def _scan(tar: _Tar) -> ShardScan:
    places: list[tuple[int, int]] = []
    labels = TarLabels()
    seen: set[str] = set()
    without, suffixes = 0, set()
    own, part = "", ""
    for stem, members in _samples(tar):
        samples = {stem: members}
        dotted = next((member.name for s, member in members.items() if _is_dotted(s)), "")
        if dotted and picture_suffix(members) is not None:
            part = part or dotted
        elif dotted:
            samples = _of_their_own(tar, stem, members, dotted)
            own = own or dotted
        for key, sample in samples.items():
            if key in seen:
                raise tar.problem(f"holds the key {key!r} twice. {_AGAIN}")
            seen.add(key)
            suffix = picture_suffix(sample)
            if suffix is None:
                without += 1
                suffixes |= set(sample)
                continue
            picture = sample[suffix]
            if picture.size == 0 or picture.size >= 2**32:
                raise tar.problem(
                    f"holds {picture.name}, a picture of {picture.size} bytes. {_AGAIN}"
                )
            places.append((picture.offset, picture.size))
            label = sample.get("cls") or sample.get("json")
            labels.add(label.name if label else "", tar.content(label) if label else None)
    if not seen:
        raise tar.problem(f"is an empty tar. {_AGAIN}")
    if not places:
        raise tar.problem(
            f"holds no picture: its {len(seen)} samples have "
            f"{', '.join(sorted(suffixes)[:8])}; pictures end in {', '.join(PICTURES)}"
        )
    offset, size = np.array(places, dtype=np.uint64).T
    label_numbers, names = labels.numbered()
    scan = ShardScan(
        offset, size.astype(np.uint32), label_numbers, names, without, labels.odd, own, part
    )
    problem = dots_problem([(tar.path.name, scan)])
    if problem:
        raise tar.problem(problem)
    return scan


def dots_problem(scans: Iterable[tuple[str, ShardScan]]) -> str:
    """What to say of tars (by name) whose names with several dots mean two things; "": nothing."""
    own, part = "", ""
    for name, scan in scans:
        own = own or (scan.dotted and f"{scan.dotted} in {name}")
        part = part or (scan.part and f"{scan.part} in {name}")
    if not (own and part):
        return ""
    return (
        f"holds {own}, a picture of its own if the last dot of its name counts, and {part}, a part "
        "of another picture's sample if the first one does: what is meant cannot be told. Pack "
        "pictures again with one dot in each name"
    )


def picture_suffix(sample: Collection[str]) -> str | None:
    """Which of a sample's suffixes is that of its picture."""
    return next((suffix for suffix in PICTURES if suffix in sample), None)


def _is_dotted(suffix: str) -> bool:
    """Whether what follows the first dot of a name has another dot, and is a picture's after it."""
    return "." in suffix and suffix.rpartition(".")[2] in PICTURES


def by_last_dot(sample: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """{key: {suffix: member}} by the last dot, of {suffix: member} by the first one.

    The keys are what stands between the two dots.
    """
    found: dict[str, dict[str, _T]] = {}
    for suffix, member in sample.items():
        stem, _, last = suffix.rpartition(".")
        found.setdefault(stem, {})[last] = member
    return found


def _of_their_own(
    tar: _Tar, key: str, sample: dict[str, _Member], picture: str
) -> dict[str, dict[str, _Member]]:
    """The samples of pictures whose names have several dots, such as photo_1.5.jpg, the first."""
    parts = by_last_dot(sample)
    for members in parts.values():
        if picture_suffix(members) is None:
            other = next(iter(members.values())).name
            raise tar.problem(
                f"holds {picture} and no {key}.{PICTURES[0]} or the like: if keys end at the first "
                f"dot, the sample {key} has no picture, and if they end at the last one, {other} "
                "belongs to none. Pack it again with one dot in the names of pictures and of what "
                "belongs to them"
            )
    return {picture_key(next(iter(m.values())).name): m for m in parts.values()}


def _samples(tar: _Tar) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, {suffix in lower case: member}) of each sample."""
    key, sample = "", dict[str, _Member]()
    for member in tar.members():
        folder, slash, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if not dot or not stem:
            continue  # hidden, or without a suffix: not part of any sample
        this = folder + slash + stem
        if this != key:
            if sample:
                yield key, sample
            key, sample = this, {}
        suffix = suffix.lower()
        if suffix in sample:
            raise tar.problem(f"holds {member.name} twice. {_AGAIN}")
        sample[suffix] = member
    if sample:
        yield key, sample


_AGAIN = "Fetch it again, or make it again."


class _Tar:
    """Reads a tar's headers one after the other."""

    def __init__(self, path: Path, file: int | None = None) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY) if file is None else os.dup(file)
        self._bytes = os.fstat(self._file).st_size
        self._start, self._window = 0, b""
        if hasattr(os, "posix_fadvise"):  # or the kernel would read the pictures too
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def problem(self, text: str) -> UserError:
        return UserError(f"Shard {self.path} {text}")

    def content(self, member: _Member) -> bytes | None:
        """What is in a small file; None: it is none."""
        if member.size > _LARGEST_TEXT:
            return None
        return self._at(member.offset, member.size)

    def members(self) -> Iterator[_Member]:
        """The regular files, in order."""
        if self._bytes == 0:
            raise self.problem(f"is empty: 0 bytes. {_AGAIN}")
        at, name, size = 0, None, None
        while True:
            header = self._at(at, BLOCK)
            if not header or len(header) < BLOCK:
                raise self._truncated(at)
            if not header.strip(b"\0"):
                self._check_end(at)
                return
            body = at + BLOCK
            own_name, length, kind = self._parse(header, at)
            if kind not in b"xgLK" and size is not None:
                length = size
            if body + length > self._bytes:
                raise self._truncated(at)
            at = body + length + -length % BLOCK
            if kind in b"xL":  # says something about the member that follows
                text = self._at(body, length)
                if kind == b"L":
                    name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
                else:
                    name, size = self._pax(text, body, name, size)
                continue
            if kind in b"gK":
                continue
            member = _Member(name or own_name, body, length)
            name = size = None
            if kind in b"0\x007":
                yield member
            elif kind != b"5" and member.name.rpartition(".")[2].lower() in PICTURES:
                raise self.problem(
                    f"holds {member.name} as a link or a special file (type {kind!r}), not as a "
                    "picture. Pack it again; tar --dereference --hard-dereference packs what links "
                    "point to."
                )

    def _at(self, offset: int, size: int) -> bytes:
        skipped = offset - self._start
        if skipped < 0 or skipped + size > len(self._window):
            self._start, skipped = offset, 0
            self._window = os.pread(self._file, max(size, _WINDOW), offset)
        return self._window[skipped : skipped + size]

    def _parse(self, header: bytes, at: int) -> tuple[str, int, bytes]:
        """(name, size, type) of a header."""
        try:
            recorded = int(header[148:156].strip(b"\0 "), 8)
            if recorded != sum(header) - sum(header[148:156]) + 8 * 32:
                raise ValueError("its checksum is wrong")
            if header[124] & 0x80:
                size = int.from_bytes(header[125:136], "big")
            else:
                size = int(header[124:136].strip(b"\0 ") or b"0", 8)
        except ValueError as error:
            if at == 0:
                message = compressed(self.path, header)
                if message:
                    raise UserError(message) from None
                raise self.problem(f"is not a tar. {_AGAIN}") from None
            raise self.problem(
                f"is damaged: the header at byte {at} is not one ({error}). {_AGAIN}"
            ) from None
        name = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0":  # GNU's own format keeps other things there
            prefix = header[345:500].partition(b"\0")[0]
            name = prefix + b"/" + name if prefix else name
        return name.decode("utf-8", "surrogateescape"), size, header[156:157]

    def _pax(
        self, text: bytes, at: int, name: str | None, size: int | None
    ) -> tuple[str | None, int | None]:
        """Name and size from the records "LENGTH KEY=VALUE\\n" of an extended header."""
        while text:
            length = text.partition(b" ")[0]
            if not length.isdigit() or not 0 < int(length) <= len(text):
                raise self.problem(f"is damaged: the extended header at byte {at}. {_AGAIN}")
            record, text = text[len(length) + 1 : int(length) - 1], text[int(length) :]
            key, _, value = record.partition(b"=")
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size" and value.isdigit():
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise self.problem("holds a sparse file. Pack it again without --sparse.")
        return name, size

    def _truncated(self, at: int) -> UserError:
        if at == self._bytes:
            return self.problem(
                f"ends at byte {at} without the two empty blocks that end a tar, so it was most "
                f"likely cut off. {_AGAIN} (If you know that it is whole: head -c 1024 /dev/zero "
                f">> {self.path})"
            )
        return self.problem(
            f"is truncated: what begins at byte {at} goes on after its end, byte {self._bytes}. "
            f"{_AGAIN}"
        )

    def _check_end(self, at: int) -> None:
        """Nothing but zeros after the last member: what is written there nobody would read."""
        while at < self._bytes:
            part = os.pread(self._file, 1 << 20, at)
            if part.strip(b"\0"):
                raise self.problem(
                    f"goes on after its end at byte {at}: two tars in one file, or a damaged one. "
                    f"{_AGAIN}"
                )
            at += len(part)
