"""Pickles are read as plain data: whatever they hold, nothing of the program is touched."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_file_target
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_scale.checkpoints import checkpoint
from moco_scale.evaluation import linear_state
from moco_scale.evaluation.pretrained import load_pretrained
from moco_scale.untrusted.pickles import ForeignError, PickleError, read_pickle
from moco_scale.untrusted.tensor_files import StoredTensor, TensorFile
from moco_scale.utils.errors import UserError

TEXT = st.text(max_size=300)
LEAVES = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | TEXT
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(TEXT | st.integers(-(1 << 62), 1 << 62), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(PLAIN, st.integers(2, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert repr(read_pickle(pickle.dumps(value, protocol), frozenset())) == repr(value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_an_error(content: bytes) -> None:
    with contextlib.suppress(PickleError):
        read_pickle(b"\x80\x04" + content, frozenset({"torch Size"}))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(trace: Path) -> dict[str, bytes]:
    """Pickles that do something to the program that unpickles them, without an end."""
    path = text(str(trace))
    parent = text("parent") + text("elsewhere") + b"s"
    return {
        "a function is called": b"cos\nmkdir\n" + path + b"\x85R",
        "a function is named on the stack": text("os") + text("mkdir") + b"\x93" + path + b"\x85R",
        "an object is made": b"cos\nmkdir\n" + path + b"\x85\x81",
        "an object is made with keywords": b"cos\nmkdir\n" + path + b"\x85}\x92",
        "an instance": b"(" + path + b"ios\nmkdir\n",
        "an instance of what lies on the stack": b"(cos\nmkdir\n" + path + b"o",
        "an extension": b"\x82\x01",
        "a line for a persistent id": b"Pabc\n",
        "out of a class's attributes": b"cpathlib\nPosixPath.mkdir\n" + path + b"\x85R",
        "attributes of a class": b"cpathlib\nPosixPath\nN}" + parent + b"\x86b",
        "attributes of torch's class": b"ctorch\nSize\nN}" + parent + b"\x86b",
        "attributes of a called one": b"ctorch\nSize\n)R}" + parent + b"b}" + parent + b"b",
        "attributes of a persistent one": text("0") + b"Q}" + parent + b"b",
        "a call of what was called": b"ctorch\nSize\n)R)R",
        "a name that is let in": b"ctorch\nSize\n",
        "eval": b"cbuiltins\neval\n" + text("1") + b"\x85R",
        "a name in pieces": b"ctorch.serialization\nos.system\n" + path + b"\x85R",
        "bytes": b"C\x01a",
        "a set": b"\x8f",
        "an old integer": b"I1\n",
        "a buffer": b"\x97",
    }


def in_zip(content: bytes) -> bytes:
    return model_file_target._with_pickle(content)


def written(folder: Path) -> Path:
    checkpoint.save(folder, {"x": torch.ones(3)}, {"step": 1})
    return folder


def as_index(content: bytes, folder: Path) -> None:
    (written(folder) / ".metadata").write_bytes(content)
    checkpoint.load(folder)


def as_tensor(content: bytes, folder: Path) -> None:
    (data,) = written(folder).glob("*.distcp")
    evil, length = in_zip(content), data.stat().st_size
    # In the place and of the length of the true one, which a zip's comment makes up for.
    assert len(evil) < length + 65536
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(evil)
    data.write_bytes(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint.load(folder)


def as_model(content: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "current.pth").write_bytes(in_zip(content))
    load_pretrained(folder / "current.pth")


def as_bare_model(content: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "current.pth").write_bytes(content)
    load_pretrained(folder / "current.pth")


def as_linear_state(content: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "linear.pth").write_bytes(in_zip(content))
    linear_state.load(folder / "linear.pth", {}, {}, "auto", {})


PLACES = [as_index, as_tensor, as_model, as_bare_model, as_linear_state]


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_does_anything(
    place: Callable[[bytes, Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    before = dict(vars(pathlib.PurePath)), dict(vars(pathlib.PosixPath)), dict(vars(torch.Size))
    opening = b"\x80\x02"
    for number, (name, attack) in enumerate(attacks(trace).items()):
        for depth, content in enumerate(
            # By itself, in a list, as a value of what a file of that kind holds.
            (attack, b"]" + attack + b"a", b"}" + text("opt") + attack + b"s")
        ):
            with pytest.raises(UserError) as error:
                place(opening + content + b".", tmp_path / f"{number}-{depth}")
            assert "\n" not in str(error.value), name
    assert not trace.exists()
    after = dict(vars(pathlib.PurePath)), dict(vars(pathlib.PosixPath)), dict(vars(torch.Size))
    assert after == before and Path("/a/b").parent == Path("/a")


def test_the_attacks_are_ones(tmp_path: Path) -> None:
    """Python's own unpickler falls for them."""
    trace = tmp_path / "trace"
    for name in ("a function is called", "an instance"):
        pickle.loads(b"\x80\x04" + attacks(trace)[name] + b".")
        assert trace.exists(), name
        trace.rmdir()
    pickle.loads(b"\x80\x04" + attacks(trace)["attributes of a class"] + b".")
    try:
        assert str(Path("/a/b").parent) == "elsewhere"
    finally:
        del pathlib.PosixPath.parent


def test_what_is_shared_or_nested_without_end_is_refused() -> None:
    doubled = b")\x94" + b"h\x00" + b"".join(b"h" + bytes([n]) + b"\x86\x94" for n in range(60))
    for content in (
        doubled,
        b"]\x94h\x00a",
        b"}\x94" + text("a") + b"h\x00s",
        b"]" * 90 + b"a" * 89,
    ):
        with pytest.raises(PickleError):
            read_pickle(b"\x80\x04" + content + b".", frozenset())


def zipped(records: list[tuple[str, bytes]], compress: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compress) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return stream.getvalue()


def tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], **odd: Any) -> bytes:
    """The pickle of one tensor of float32, whose record has six numbers."""
    values: dict[str, Any] = {"kind": "FloatStorage", "key": "0", "count": 6, "first": 0} | odd

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            kind = getattr(torch, values["kind"])
            stored = ("storage", kind, values["key"], "cpu", values["count"])
            return stored if value is Ellipsis else None

    class Made:
        def __reduce__(self) -> Any:
            tail: Any = (values["first"], shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, (Ellipsis, *tail)

    stream = io.BytesIO()
    Pickler(stream, 2).dump(Made())
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_only_dense_tensors_whose_numbers_are_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    numbers = torch.arange(6, dtype=torch.float32)

    def stored(shape: tuple[int, ...], strides: tuple[int, ...], **odd: Any) -> torch.Tensor:
        content = tensor_pickle(shape, strides, **odd)
        path.write_bytes(zipped([("a/data.pkl", content), ("a/data/0", numbers.numpy().tobytes())]))
        with TensorFile(path) as file:
            assert isinstance(file.content, StoredTensor)
            return file.read(file.content)

    assert torch.equal(stored((2, 3), (3, 1)), numbers.view(2, 3))
    assert torch.equal(stored((2, 3), (1, 2)), numbers.view(3, 2).T)
    assert torch.equal(stored((2,), (1,), first=3), numbers[3:5])
    assert stored((0, 5), (7, 1)).shape == (0, 5)
    for shape, strides, odd in (
        ((1 << 30,), (0,), {}),  # one number that would take 4 GB
        ((3, 2), (0, 1), {}),
        ((2, 2), (1, 1), {}),
        ((2, 2), (4, 1), {}),  # with gaps
        ((7,), (1,), {}),
        ((6,), (1,), {"first": 1}),
        ((-1,), (1,), {}),
        ((6,), (-1,), {"first": 5}),
        ((0, 1 << 40, 1 << 40), (1, 1, 1), {}),
        ((2, 3), (1,), {}),
        ((6,), (1,), {"count": 7}),
        ((3,), (1,), {"kind": "DoubleStorage"}),
        ((6,), (1,), {"key": "1"}),
        ((6,), (1,), {"key": "../0"}),
        ((6,), (1,), {"kind": "IntStorage"}),
        ((3,), (1,), {"kind": "ComplexFloatStorage"}),
    ):
        with pytest.raises(PickleError):
            stored(shape, strides, **odd)


def test_zips_that_torch_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = ("a/data.pkl", b"\x80\x02}.")

    def problem(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(PickleError) as error, TensorFile(path):
            pass
        return str(error.value)

    path.write_bytes(zipped([data]))
    with TensorFile(path) as file:
        assert file.content == {}
    assert "compressed" in problem(
        zipped([data, ("a/data/0", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    )
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped([data, data])
    assert "does not write" in problem(twice)
    assert "does not write" in problem(zipped([data, ("b/data/0", b"")]))
    assert "byte order" in problem(zipped([data, ("a/byteorder", b"big")]))
    assert "damaged" in problem(zipped([("a/data", b"")]))
    flipped = bytearray(zipped([data]))
    flipped[flipped.index(b"\x80\x02}.") + 2] ^= 1
    assert "not what was written" in problem(bytes(flipped))


def test_a_sparse_or_complex_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "current.pth"
    for tensor in (
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.int32),
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8),
        torch.nn.Parameter(torch.ones(2)),
    ):
        torch.save({"opt": {}, "model": {"a": tensor}}, path)
        with pytest.raises(UserError, match="nothing was run"):
            load_pretrained(path)


def test_an_unfinished_name_says_no_more_than_it_should() -> None:
    name = "x" * 100 + "\x1b[2J"
    with pytest.raises(PickleError) as error:
        read_pickle(b"\x80\x04" + text("os") + text(name) + b"\x93.", frozenset())
    assert isinstance(error.value, ForeignError) and "\x1b" not in str(error.value)
    assert len(str(error.value)) < 200
    assert os.linesep not in str(error.value)
