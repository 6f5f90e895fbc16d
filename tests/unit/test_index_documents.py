"""What an index may say: whatever stands in its files, it is read right or refused by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_scale.data.shards import index_file
from moco_scale.data.shards.index_file import INDEX_DTYPE, index_name, read_rows, rows_checksum
from moco_scale.untrusted.shard_index import ShardIndex, parse_index, parse_scanned_index
from moco_scale.utils.errors import UserError

MOST = 2**64 - 1
SHARD = {"name": "train-000000.tar", "bytes": 10240, "samples": 2, "checksum": "0" * 32}
HEADER: dict[str, Any] = {
    "format": index_file.FORMAT,
    "version": 1,
    "classes": ["ash", "birch"],
    "splits": {
        "train": {
            "samples": 4,
            "index": "train-index.npy",
            "checksum": "0" * 32,
            "shards": [SHARD, SHARD | {"name": "a/train-000001.tar", "bytes": 5000}],
        }
    },
    "made": {"by": "x"},
}

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [-1, 2**63, 2**64, 2**70, 10**30, 1.5, float("inf"), float("nan"), "text", "", [], {}]
    ),
    st.text(max_size=5),
)
ODD_NAMES = st.sampled_from(
    ["../x", "/x", "", ".", "..", "a//b", "a/../b", "x\0", "a" * 256, "a/" * 40 + "b", "\ud800"]
)


def written(header: object) -> bytes:
    return json.dumps(header).encode()


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """The header with one value replaced."""
    header = json.loads(json.dumps(HEADER))
    place = header
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return header  # type: ignore[no-any-return]


PATHS: list[tuple[str | int, ...]] = [
    ("format",),
    ("version",),
    ("classes",),
    ("splits",),
    ("classes", 0),
    ("splits", "train"),
    *(("splits", "train", key) for key in ("samples", "checksum", "shards")),
    ("splits", "train", "shards", 0),
    *(("splits", "train", "shards", 1, key) for key in ("name", "bytes", "samples", "checksum")),
]


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(PATHS), value=ODD)
def test_a_value_of_another_kind_is_refused_or_right(
    path: tuple[str | int, ...], value: object
) -> None:
    try:
        header = parse_index(written(changed(path, value)), "X")
    except UserError as error:
        assert str(error).startswith("X ") and str(error).isprintable() and len(str(error)) < 2000
        return
    shards = header.splits["train"].shards if "train" in header.splits else []
    assert all(0 <= shard.bytes <= 2**50 and not shard.name.startswith("/") for shard in shards)
    assert all(isinstance(name, str) for name in header.classes)


@settings(max_examples=40, deadline=None)
@given(name=ODD_NAMES)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^X is damaged"):
        parse_index(written(changed(("splits", "train", "shards", 0, "name"), name)), "X")
    split = name if name not in HEADER["splits"] else "."
    with pytest.raises(UserError, match=r"^X is damaged"):
        parse_index(written(changed(("splits",), {split: HEADER["splits"]["train"]})), "X")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"a":' * 100_000, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" + b"[]," * (1 << 20) + b"0]", "1,048,576 lists and objects"),
        (b'{"format": "moco_scale shards", "version": ' + b"1" * 5000 + b"}", "damaged"),
        (b'{"format": "moco_scale shards", "version": ' + b"1" * 500 + b"}", r"version \?"),
        (b'{"format": "moco_scale shards", "version": 2}', "version 2"),
        (b'{"format": "\\u001b[2J"}', "is not an index"),
        (b"3", "is not an index"),
        (written(changed(("classes",), ["x" * 1001])), "classes.0"),
        (written(changed(("splits", "train", "shards"), [SHARD, SHARD])), "named twice"),
        (written(changed(("splits", "train", "samples"), 5)), "do not add up"),
        (
            written(changed(("splits", "train", "shards", 0, "bytes"), 2**50)),
            "more bytes than any",
        ),
    ],
)
def test_what_is_no_index_says_so(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_index(content, "X")


def test_where_a_version_leads_is_never_taken_from_what_was_fetched() -> None:
    spoilt = SHARD | {"samples": 4, "version": "/../../x", "scan": "/home/me/thesis"}
    header = parse_index(written(changed(("splits", "train", "shards"), [spoilt])), "X")
    assert not {"version", "scan"} & set(header.splits["train"].shards[0].model_dump())
    with pytest.raises(UserError, match=r"shards\.0\.version"):
        parse_scanned_index(written(changed(("splits", "train", "shards"), [spoilt])), "X")


OFFSET = st.sampled_from([0, 511, 512, 1024, 4999, 5000, 10240, 2**63, MOST - 100, MOST])
SIZE = st.sampled_from([0, 1, 100, 5000, 9728, 10240, 2**32 - 1])
LABEL = st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 2**31 - 1])


def row(shard: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
    """One that may be right, and one that may be anything."""
    good = st.tuples(st.just(shard), st.just(512), SIZE.filter(lambda n: 0 < n < 5000), st.just(0))
    number = st.sampled_from([0, 1, 2, 2**32 - 1])
    return st.one_of(
        good, good, st.tuples(number, st.one_of(OFFSET, st.integers(0, MOST)), SIZE, LABEL)
    )


def header_for(rows: np.ndarray) -> ShardIndex:
    header = changed(("splits", "train", "checksum"), rows_checksum(rows))
    return parse_index(written(header), "X")


@settings(max_examples=150, deadline=None)
@given(rows=st.tuples(row(0), row(0), row(1), row(1)))
def test_rows_that_are_accepted_lie_within_their_shards(
    rows: tuple[tuple[int, int, int, int], ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    array = np.array(list(rows), dtype=INDEX_DTYPE)
    folder = tmp_path_factory.getbasetemp()
    np.save(folder / index_name("train"), array)
    sizes = [10240, 5000]
    right = [shard for shard, *_ in rows] == [0, 0, 1, 1] and all(
        offset >= 512 and size > 0 and offset + size <= sizes[shard] and -1 <= label < 2
        for shard, offset, size, label in rows
    )
    try:
        read_rows(folder, "train", header_for(array))
        assert right
    except UserError as error:
        assert not right and "The index" in str(error)


def good_rows() -> np.ndarray:
    rows = np.zeros(4, INDEX_DTYPE)
    rows["shard"], rows["offset"], rows["size"] = [0, 0, 1, 1], 512, 100
    return rows


def saved(rows: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, rows)
    return content.getvalue()


def test_rows_have_to_be_in_the_order_of_their_shards_and_as_many(tmp_path: Path) -> None:
    for order in ([1, 1, 0, 0], [0, 1, 1, 1]):
        rows = good_rows()
        rows["shard"] = order
        (tmp_path / index_name("train")).write_bytes(saved(rows))
        with pytest.raises(UserError, match=r"order of the shards|other numbers of images"):
            read_rows(tmp_path, "train", header_for(rows))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_header_of_rows_that_is_another_is_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, content = good_rows(), saved(good_rows())
    changes = [
        (
            b"(4,)",
            data.draw(st.sampled_from([b"(True,)", b"(4.0,)", b"(-4,)", b"(4, 1)", b"(9,)"])),
        ),
        (b"False", b"True"),
        (b"'<u8'", b"'|O8'"),
        (b"\x01\x00", data.draw(st.sampled_from([b"\x02\x00", b"\x03\x00", b"\xff\xff"]))),
        (b"}", b"'x': " + b"(" * 200),
        (b"\x93NUMPY", b"PK\x03\x04xx"),
        (content[8:10], b"\xff\xff"),
        (b"", b"\0"),
    ]
    old, new = data.draw(st.sampled_from(changes))
    position = data.draw(st.integers(0, len(content)))
    spoilt = data.draw(
        st.sampled_from([content.replace(old, new, 1), content[:position], content + b"x"])
    )
    path = tmp_path_factory.getbasetemp() / index_name("train")
    path.write_bytes(spoilt)
    if spoilt == content:
        read_rows(path.parent, "train", header_for(rows))
        return
    with pytest.raises(UserError, match=r"The index .* is damaged"):
        read_rows(path.parent, "train", header_for(rows))


def test_a_file_without_an_end_is_neither_read_nor_waited_for(tmp_path: Path) -> None:
    header = header_for(good_rows())
    (tmp_path / index_name("train")).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no regular file"):
        read_rows(tmp_path, "train", header)
    (tmp_path / index_file.INDEX_JSON).write_bytes(b" " * (1 << 20))
    with pytest.raises(UserError, match="damaged"):
        index_file.read_header(tmp_path)
