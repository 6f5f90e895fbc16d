"""What comes from outside: text that can be shown, names that stay inside, JSON of a schema."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from moco_scale.untrusted.documents import (
    Document,
    DocumentError,
    check,
    parse_document,
    parse_json,
    read_bounded,
    read_json,
)
from moco_scale.untrusted.names import PlainName, RelativePath, component_problem, inside, without
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable, printable_lines


class Shelf(Document):
    count: int = Field(ge=0, le=10)
    share: float = 0.0
    file: Annotated[str, without(component_problem)] = "a"
    path: RelativePath = "a/b"
    version: PlainName = "1"


@given(st.one_of(st.text(st.characters(), max_size=300), st.binary(max_size=300)))
@settings(max_examples=200, deadline=None)
def test_printable_text_is_one_line_that_encodes(value: str | bytes) -> None:
    shown = printable(value)
    assert shown.isprintable() and len(shown.splitlines()) <= 1 and len(shown) <= 200
    shown.encode("utf-8")


def test_printable_text_says_what_it_was() -> None:
    assert printable("Ära 日本 ash.jpg") == "Ära 日本 ash.jpg"
    assert printable("a\x1b[2J\nb\u2028c\u202ed\udce9") == r"a\x1b[2J\nb\u2028c\u202ed\xe9"
    assert printable(b"caf\xe9") == r"caf\xe9"
    assert printable("x" * 300) == "x" * 199 + "…"
    assert printable("\x00" * 50, 9) == r"\x00\x00…"
    assert printable_lines("one\ntwo\r\x07") == "one\ntwo\\r\\x07"


@pytest.mark.parametrize("number", ["true", "1.0", "-1", "11", '"1"', "null", "[]", str(10**30)])
def test_a_number_of_another_kind_or_size_is_refused(number: str) -> None:
    with pytest.raises(DocumentError, match="shelf: count: "):
        parse_document(f'{{"count": {number}}}'.encode(), Shelf, "shelf")


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(DocumentError, match=r"count: .*; share: .*finite.*; file: 'a/b' has a /"):
        check({"count": 99, "share": float("inf"), "file": "a/b"}, Shelf, "shelf")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\0b", "\udce9", "é" * 128, "a" * 256, "../a"]
)
def test_a_component_is_no_way_elsewhere(name: str) -> None:
    with pytest.raises(DocumentError, match="file: "):
        check({"count": 1, "file": name}, Shelf, "shelf")


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/../b", "..", "a/", "./a", "a/" * 40 + "b"])
def test_a_relative_path_stays_below(name: str) -> None:
    with pytest.raises(DocumentError, match="path: "):
        check({"count": 1, "path": name}, Shelf, "shelf")
    with pytest.raises(UserError, match="has to lie inside"):
        inside(Path("/nowhere"), name, "shard")


@pytest.mark.parametrize("name", ["", ".hidden", "-option", "a b", "a;b", "ä", "a/b", "a" * 300])
def test_a_name_of_our_own_has_our_alphabet(name: str) -> None:
    with pytest.raises(DocumentError, match="version: "):
        check({"count": 1, "version": name}, Shelf, "shelf")


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "out").symlink_to(tmp_path)
    assert inside(tmp_path / "set", "a/b.tar", "shard") == tmp_path / "set/a/b.tar"
    with pytest.raises(UserError, match="leads out of the folder"):
        inside(tmp_path / "set", "out/b.tar", "shard")


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 10**6, b'{"a": NaN}', b"9" * 5000, b'"\\ud800"', b"\xff", b"{} {}", b"[1,]"],
)
def test_what_is_no_json_is_named(content: bytes) -> None:
    with pytest.raises(DocumentError, match="notes is not valid JSON"):
        parse_json(content, "notes")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(Shelf.model_fields)), json_values))
@settings(max_examples=100, deadline=None)
def test_any_value_fits_a_schema_or_is_refused(value: dict[str, Any]) -> None:
    try:
        found = check(json.loads(json.dumps(value)), Shelf, "shelf")
    except DocumentError as error:
        assert str(error).isprintable()
    else:
        assert 0 <= found.count <= 10


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path, 6, "notes") == [1]
    with pytest.raises(DocumentError, match="more than 5 bytes"):
        read_bounded(path, 5, "notes")
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # sparse: no more than the limit is read
    with pytest.raises(DocumentError, match="more than 100 bytes"):
        read_json(path, 100, "notes")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it
    os.mkfifo(tmp_path / "busy")
    writer = os.open(tmp_path / "busy", os.O_RDWR)  # somebody may write to this one, some time
    for name, reason in (
        ("none", "No such file"),
        (".", "Is a directory"),
        ("pipe", "no regular file"),
        ("busy", "no regular file"),
    ):
        with pytest.raises(DocumentError, match=reason):
            read_json(tmp_path / name, 100, "notes")
    os.close(writer)
    with pytest.raises(DocumentError, match="null"):
        read_json("a\0b", 100, "notes")
