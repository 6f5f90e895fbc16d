"""Lists of classes as people and programs write them."""

import re
from pathlib import Path

import pytest

from moco_scale.data.tools.ilsvrc import read_ground_truth
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
    found = read_ground_truth(truth, ["b.jpg", "a.jpg", "c.jpg"])
    assert found == {"a": "n02110185", "b": "n02119789", "c": "n02119789"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"1\n\nx7\n1\n", "line 3: 'x7' is no number, and 2 of the 3 lines are"),
        (b"1\n1\n\xc2\xb2\n", "is no number"),
        (b"1\n2\n1001\n", "line 3: 1001 is not an ILSVRC2012 id, which are from 1 to 1000"),
        (b"1\n0\n1\n", "line 2: 0 is not an ILSVRC2012 id"),
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
    with pytest.raises(UserError) as caught:
        read_ground_truth(tmp_path / "truth.txt", ["a.jpg", "b.jpg", "c.jpg"])
    assert words in str(caught.value) and len(str(caught.value)) < 2000


def test_the_order_of_ids(tmp_path: Path) -> None:
    """The first ids, the last one, and those of the first five validation images."""
    said = {1: "n02119789", 2: "n02100735", 3: "n02110185", 10: "n02123394", 1000: "n03255030"}
    # sea snake, alp, Shetland sheepdog, soup bowl, cradle
    said |= {490: "n01751748", 361: "n09193705", 171: "n02105855", 822: "n04263257"}
    said |= {297: "n03125729"}
    (tmp_path / "truth.txt").write_text("".join(f"{number}\n" for number in range(1, 1001)))
    names = [f"{number:04}.jpg" for number in range(1, 1001)]
    found = read_ground_truth(tmp_path / "truth.txt", names)
    assert {number: found[f"{number:04}"] for number in said} == said
    assert len(set(found.values())) == 1000
    assert all(re.fullmatch("n[0-9]{8}", str(name)) for name in found.values())
