"""Lists of classes as people and programs write them, and meta.mat whatever its bytes."""

import contextlib
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mat_target import SEEDS, mat_file, run

from moco_scale.data.tools import matfile
from moco_scale.data.tools.ilsvrc import read_ground_truth
from moco_scale.data.tools.matfile import MatFileError, struct_array
from moco_scale.utils.errors import UserError

IMAGES = ["c 1.jpg", "a.JPEG", "na\u0308h.jpg"]
CLASSES = {"a": "ash", "c 1": "golden oak", "n\u00e4h": 2}
TABS = "a.JPEG\tash\nval/c 1.jpg\tgolden oak\nn\u00e4h\t2\n"


@pytest.mark.parametrize(
    "content",
    [
        TABS.encode(),
        b"\xef\xbb\xbf" + TABS.encode(),
        TABS.encode("utf-16"),
        TABS.replace("\n", "\r\n").encode() + b"\r\n  \r\n\r\n",
        TABS.replace("\n", "\r").encode(),
        TABS.replace("\t", ",").encode(),
        TABS.replace("\t", ' , "').replace("\n", '"\n').encode(),
        TABS.replace("\t", ";").encode(),
        TABS.replace("\n", "\t0\t0\t63\t63\n").encode(),
        b"\n\n" + TABS.encode() + b"\n" + TABS.encode(),
    ],
)
def test_what_surrounds_lines_does_not_matter(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "truth.txt").write_bytes(content)
    assert read_ground_truth(tmp_path / "truth.txt", IMAGES) == CLASSES


@pytest.mark.parametrize("text", ["a ash\nc 1 oak\nb 2\n", "a.jpg ash\nc 1.jpg oak\nb.jpg 2\n"])
def test_names_with_spaces(tmp_path: Path, text: str) -> None:
    (tmp_path / "truth.txt").write_text(text)
    found = read_ground_truth(tmp_path / "truth.txt", ["a.jpg", "b.jpg", "c 1.jpg"])
    assert found == {"a": "ash", "b": 2, "c 1": "oak"}


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "truth.txt").write_bytes(b"caf\xe9.jpg 7\n")
    assert read_ground_truth(tmp_path / "truth.txt", ["caf\udce9.jpg"]) == {"caf\\xe9": 7}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_numbers_in_order(tmp_path: Path, end: str) -> None:
    truth = tmp_path / "truth.txt"
    truth.write_bytes(b"\xef\xbb\xbf" + end.join(("3", "1", "1", "", "")).encode())
    (tmp_path / "meta.mat").write_bytes(mat_file({1: "n00000007", 3: "n00000002"}, "<", True))
    found = read_ground_truth(truth, ["b.jpg", "a.jpg", "c.jpg"])
    assert found == {"a": "n00000002", "b": "n00000007", "c": "n00000007"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"1\n\nx7\n1\n", "line 3: 'x7' is no number, and 2 of the 3 lines are"),
        (b"1\n1\n\xc2\xb2\n", "is no number"),
        (b"1\n2\n9\n", "line 3: 9 is not an ILSVRC2012 id of meta.mat"),
        (b"1\n2\n", "has 2 lines, and there are 3 validation images"),
        (b"1\n2\n3\n4\n", "has 4 lines"),
        (b"a ash\nb\n", "line 2: 'b' names no class"),
        (b"a,ash\n\na,oak\n", "line 3: a has another class than in a line before"),
        (b"\xef\xbb\xbf\r\n \r\n", "is empty"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "is not a text"),
        (b"\xff\xfea", "is not a text"),
        (b"1\n" * 40_000_000, "has more than 67,108,864 bytes"),
        (b"9" * 5000 + b"\n1\n1\n", "line 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "truth.txt").write_bytes(content)
    (tmp_path / "meta.mat").write_bytes(mat_file({1: "n00000001", 2: "n00000002"}, "<", False))
    with pytest.raises(UserError) as caught:
        read_ground_truth(tmp_path / "truth.txt", ["a.jpg", "b.jpg", "c.jpg"])
    assert words in str(caught.value) and len(str(caught.value)) < 2000


@settings(max_examples=150, deadline=None)
@given(
    seed=st.sampled_from(SEEDS()),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=8)), max_size=6),
    length=st.integers(0, 2000),
)
def test_any_bytes_are_an_answer_or_an_error_that_is_meant(
    seed: bytes, edits: list[tuple[int, bytes]], length: int
) -> None:
    data = bytearray(seed)
    for at, new in edits:
        data[at : at + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        run(bytes(data[: length or None]), Path(folder))
    with contextlib.suppress(MatFileError):
        struct_array(bytes(data), "synsets", ("ILSVRC2012_ID", "WNID"))


def _mat(*elements: bytes) -> bytes:
    return b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"".join(elements)


def _element(kind: int, data: bytes) -> bytes:
    return struct.pack("<2I", kind, len(data)) + data + bytes(-len(data) % 8 if kind != 15 else 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_mat(*[_element(15, zlib.compress(bytes(1 << 20)))] * 3), "variables of more than"),
        (_mat(_element(14, _element(6, bytes(8)) * 5000)), "more than 4,096 elements"),
        (_mat(_element(14, _element(6, bytes(8)) + _element(5, bytes(400)) * 2)), "dimensions"),
        (_mat(_element(14, b"")), "damaged"),
        (_mat(_element(14, _element(6, bytes(8)))), "damaged"),
        (_mat(_element(14, bytes(8))[:-4]), "reaches beyond the end"),
        (_mat(_element(15, b"x\x9c")), "cut off"),
        (_mat(_element(15, b"no zlib")), "damaged"),
        (_mat() + bytes(1 << 21), "more than"),
        (b"MATLAB 7.3 is HDF5", "not a MATLAB 5 file"),
    ],
)
def test_files_made_to_do_harm(content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAT_FILE", 1 << 21), ("MAT_INFLATED", 1 << 21), ("MAT_ELEMENTS", 4096)):
        monkeypatch.setattr(matfile, name, limit)
    with pytest.raises(MatFileError, match=words):
        struct_array(content, "synsets", ("ILSVRC2012_ID", "WNID"))


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1.5, 0, -3, 1e300])
def test_ids_that_are_no_numbers_of_classes(tmp_path: Path, number: float) -> None:
    (tmp_path / "truth.txt").write_text("1\n")
    content = mat_file({number: "n00000001"}, "<", False)  # type: ignore[dict-item]
    (tmp_path / "meta.mat").write_bytes(content)
    with pytest.raises(UserError, match="for an id"):
        read_ground_truth(tmp_path / "truth.txt", ["a.jpg"])
