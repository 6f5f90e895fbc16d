"""Headers of tars: what tarfile writes is read alike, whatever else there is ends in a message."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_target import FORMATS, SEEDS, extended, file_of, record, run

from moco_scale.data.shards.recognise import first_members
from moco_scale.data.shards.tar_scan import key_in, scan_tar
from moco_scale.untrusted import tar_headers
from moco_scale.untrusted.limits import TAR_EXTENDED_HEADER
from moco_scale.untrusted.tar_headers import FILE, FOLDER, LINK, TarHeaders
from moco_scale.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars")


def members(data: bytes) -> list[tar_headers.Member]:
    def at(offset: int, size: int) -> bytes:
        assert size <= len(data) + tar_headers.BLOCK, "read before it was compared"
        return data[offset : offset + size]

    return list(TarHeaders(at, "Shard x", "Fetch it again.", end=len(data)))


names = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)
    | st.text("abc", min_size=60, max_size=140)
    | st.binary(min_size=1, max_size=9).map(
        lambda b: b.replace(b"\0", b"0").replace(b"/", b"1").decode("utf-8", "surrogateescape")
    ),
    min_size=1,
    max_size=4,
).map("/".join)
entries = st.tuples(names, st.binary(max_size=1100), st.sampled_from("fffdls"))


@settings(max_examples=60, deadline=None)
@given(st.lists(entries, max_size=5), st.sampled_from(FORMATS), st.booleans())
def test_what_tarfile_writes_is_read_as_tarfile_reads_it(
    wanted: list[tuple[str, bytes, str]], format: int, with_global: bool
) -> None:
    out = io.BytesIO()
    comments = {"comment": "made by git"} if with_global else {}
    with tarfile.open(fileobj=out, mode="w", format=format, pax_headers=comments) as tar:
        for name, content, kind in wanted:
            info = tarfile.TarInfo(name)
            if kind == "f":
                info.size = len(content)
            else:
                info.type = {"d": tarfile.DIRTYPE, "l": tarfile.LNKTYPE, "s": tarfile.SYMTYPE}[kind]
                info.linkname = name[::-1]
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # too long for ustar
                continue
    data = out.getvalue()
    if not members(data):  # tarfile does not read a global header alone
        return
    kinds = {FILE: tarfile.TarInfo.isreg, FOLDER: tarfile.TarInfo.isdir, LINK: lambda m: True}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = tar.getmembers()
        ours = members(data)
        assert [m.name.rstrip("/") for m in ours] == [m.name for m in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert kinds[mine.kind](other)
            if mine.kind == FILE:
                assert (mine.offset, mine.size) == (other.offset_data, other.size)
            elif mine.kind == LINK:
                assert mine.link == other.linkname


seeds = SEEDS()
changes = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 20), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.just(0)),
    st.tuples(st.just("field"), st.integers(0, 30), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("type"), st.integers(0, 30), st.sampled_from(b"xgLKXSVMDN01234567\0")),
)
FIELDS = (0, 124, 124, 148, 157, 257, 345)


def changed(data: bytes, kind: str, place: int, how: Any) -> bytes:
    content = bytearray(data)
    block = place % (len(content) // 512) * 512
    if kind == "flip":
        content[place % len(content)] ^= 1 << how
    elif kind == "cut":
        del content[place % len(content) :]
    elif kind == "type":
        content[block + 156] = how
    else:
        start = block + FIELDS[place % len(FIELDS)]
        content[start : start + len(how)] = how
    if kind in ("type", "field") and content[block + 257 : block + 262] == b"ustar":
        content[block + 148 : block + 156] = b" " * 8
        total = sum(content[block : block + 512])
        content[block + 148 : block + 156] = f"{total:06o}\0 ".encode()
    return bytes(content)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(seeds), st.lists(changes, min_size=1, max_size=4))
def test_a_damaged_tar_is_read_or_named(folder: Path, data: bytes, how: list[Any]) -> None:
    for change in how:
        if len(data) >= 512:
            data = changed(data, *change)
    run(data, folder)


def test_seeds_are_read(folder: Path) -> None:
    for data in seeds:
        run(data, folder)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"X"])
def test_an_extended_header_is_not_read_beyond_what_any_needs(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(extended(kind, 3 << 30))
    os.truncate(path, (3 << 30) + 2048)  # a hole: on the disk it takes 4 kB
    with pytest.raises(UserError, match=r"byte 0 claims 3,221,225,472 bytes.*1,048,576"):
        scan_tar(path)
    assert first_members(path, 1) == []


def test_an_extended_header_of_the_largest_size_takes_linear_time() -> None:
    class Counted(bytes):
        """Bytes that count those that are copied out of them or searched."""

        seen = 0

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            if isinstance(place, slice):
                Counted.seen += len(found)
                return Counted(found) if len(found) > 100 else found
            return found

        def rstrip(self, *characters: Any) -> bytes:
            return Counted(super().rstrip(*characters))

    records = record(b"a", b"b") * (TAR_EXTENDED_HEADER // 6 - 8)
    data = extended(b"x", len(records), records) + file_of(5) + bytes(1024)
    found = list(TarHeaders(lambda o, s: Counted(data)[o : o + s], "", "", end=len(data)))
    assert [m.size for m in found] == [5]
    assert Counted.seen < 12 * len(data)


PAX_RECORDS = {
    "a size that is negative": (record(b"size", b"-5"), "a size in it is none"),
    "a size that is text": (record(b"size", b"1_000"), "a size in it is none"),
    "a size beyond the file": (record(b"size", b"9" * 18), "is truncated"),
    "a size of thousands of digits": (record(b"size", b"9" * 5000), "a size in it is none"),
    "a length of 0": (b"0 path=a\n", "a record at its byte 0"),
    "a length beyond the header": (b"99 path=a\n", "a record at its byte 0"),
    "a length of thousands of digits": (b"9" * 5000 + b" path=a\n", "a record at its byte 0"),
    "a length that is negative": (b"-9 path=a\n", "a record at its byte 0"),
    "no value": (b"8 patha\n", "a record at its byte 0"),
    "no end of a line": (b"9 path=ab", "a record at its byte 0"),
    "sparse 0.1": (record(b"GNU.sparse.map", b"0,1"), r"holds a file as a sparse file"),
    "sparse 1.0": (
        record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.name", b"a\x1b.jpg"),
        r"holds a\\x1b\.jpg as a sparse file",
    ),
}


@pytest.mark.parametrize("case", PAX_RECORDS)
def test_records_that_are_none(case: str) -> None:
    text, words = PAX_RECORDS[case]
    with pytest.raises(UserError, match=words):
        members(extended(b"x", len(text), text) + file_of(5) + bytes(1024))


@pytest.mark.parametrize("key", [b"path", b"size", b"linkpath"])
def test_a_global_header_gives_no_member_its_name(key: bytes) -> None:
    text = record(key, b"5")
    with pytest.raises(UserError, match=f"gives all members one {key.decode()}"):
        members(extended(b"g", len(text), text) + file_of(5) + bytes(1024))
    text = record(b"comment", b"5")
    found = members(extended(b"g", len(text), text) + file_of(5) + bytes(1024))
    assert [m.name for m in found] == ["1.jpg"]


def with_size(field: bytes) -> bytes:
    block = bytearray(file_of())
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + bytes(1024)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (b"\xff" * 12, "not a tar"),  # -1
        (b"\x80" + b"\xff" * 11, "is truncated"),
        (b"\xc0" + b"\0" * 11, "not a tar"),
        (b"-0000000005\0", "not a tar"),
        (b"0o000000005\0", "not a tar"),
        (b"0_000000005\0", "not a tar"),
        (b"777777777777", "is truncated"),
    ],
)
def test_sizes_that_are_none(field: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        members(with_size(field))


def test_a_sparse_file_of_gnu_is_named() -> None:
    info = tarfile.TarInfo("big.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(UserError, match=r"big\.jpg as a sparse file.*--sparse"):
        members(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_checksums_of_signed_bytes_are_read() -> None:
    block = bytearray(file_of(name="caf\udce9.jpg"))
    signed = sum(b - 256 * (b > 127) for b in (*block[:148], *b" " * 8, *block[156:]))
    block[148:156] = f"{signed:06o}\0 ".encode()
    assert [m.name for m in members(bytes(block) + bytes(1024))] == ["caf\udce9.jpg"]


def test_a_key_is_fit_to_be_shown() -> None:
    assert key_in(file_of(name="x\x1b[2J\n\u2028caf\udce9.jpg")) == r"x\x1b[2J\n\u2028caf\xe9"
    assert key_in(b"") == key_in(b"\xff" * 512) == ""


ODD_NAMES = ("\x1b[2J", "\n2026 all is well", "\u2028", "\x85", "caf\udce9", "a" * 90)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_messages_hold_no_name_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "0.tar"
    for content in (
        file_of(5, f"{name}.jpg") * 2,
        file_of(0, f"{name}.jpg"),
        file_of(5, f"1.{name}"),
        file_of(5, name),
        file_of(5, f"{name}.jpg")[:600],
    ):
        path.write_bytes(content + bytes(1024) * (len(content) != 600))
        with pytest.raises(UserError) as caught:
            scan_tar(path)
        assert str(caught.value).isprintable() and str(caught.value).encode()
