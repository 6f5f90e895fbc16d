"""ILSVRC2012 as it is downloaded: its archives, and the classes of its validation pictures.

The official ground truth (``ILSVRC2012_validation_ground_truth.txt``, in the development kit) has
one number a line in the order of the pictures' names: the ILSVRC2012_ID of the class, from 1 to
1000, which is not the place in the sorted WordNet ids that everybody trains with. What it stands
for is in the kit's ``meta.mat``, a MATLAB 5 file, which matfile.py reads. Other widespread forms
of the same facts name the picture and its class in each line, and need no kit.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from moco_scale.data.matfile import MatFileError, struct_array
from moco_scale.errors import UserError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT_TAR = "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_WNID = re.compile(r"n\d{8}")
_MOST_BYTES = 64 << 20  # no file of the kit is anywhere near

ACCEPTED = (
    f"Accepted are {DEVKIT_TAR} (or the folder it unpacks to, or {_TRUTH} with {_META} beside it), "
    "a text with a picture's name and its class or class number (from 0, in the sorted order of "
    "the classes) in each line, LOC_val_solution.csv, and a text with one class name a line in "
    "the order of the pictures' names"
)


def read_ground_truth(path: Path, pictures: Sequence[str]) -> dict[str, str | int]:
    """The class of each validation picture, by file name without suffix.

    pictures: the names of all validation pictures; forms without names are in their sorted order.
    Returns class names, or numbers in the sorted order of the class names.

    Raises UserError: not readable, or in no form that is known (the message lists them).
    """
    stems = sorted(PurePosixPath(name).stem for name in pictures)
    truth, meta, name = _load(path)
    lines = [line for line in truth.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{name} is empty. {ACCEPTED}.")
    if lines[0].replace(" ", "") == "ImageId,PredictionString":
        lines = lines[1:]
    words = [line.replace(",", " ").split() for line in lines]
    if all(len(line) == 1 for line in words):
        return _in_order(name, [line[0] for line in words], meta, stems)
    labels: dict[str, str | int] = {}
    for number, line in enumerate(words, start=1):
        if len(line) < 2:
            raise UserError(f"{name}, line {number}: {lines[number - 1]!r} names no class.")
        picture, label = line[0], line[1]
        stem = PurePosixPath(picture).stem if is_named(picture) else picture
        labels[stem] = int(label) if label.isdigit() else label
    return labels


def is_named(picture: str) -> bool:
    """Whether a picture is named with its suffix, not by its stem only."""
    return "." in picture


def _in_order(
    name: str, values: list[str], meta: bytes | None, stems: list[str]
) -> dict[str, str | int]:
    """Labels given one a line, without the pictures' names."""
    if len(values) != len(stems):
        raise UserError(
            f"{name} has {len(values)} lines, and there are {len(stems)} validation pictures. "
            "A file that does not name the pictures must have one line for each."
        )
    if not all(value.isdigit() for value in values):
        return dict(zip(stems, values, strict=True))
    if meta is None:
        raise UserError(
            f"{name} holds ILSVRC2012 ids (1 to 1000), which mean nothing without {_META} of the "
            f"development kit. {ACCEPTED}."
        )
    wnid = _ids(name, meta)
    unknown = sorted({value for value in values if int(value) not in wnid})
    if unknown:
        raise UserError(f"{name}: {unknown[0]} is not an ILSVRC2012 id of {_META}.")
    return {stem: wnid[int(value)] for stem, value in zip(stems, values, strict=True)}


def _ids(name: str, meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WordNet id."""
    try:
        synsets = struct_array(meta, "synsets", ("ILSVRC2012_ID", "WNID"))
        ids = {int(synset["ILSVRC2012_ID"] or 0): str(synset["WNID"]) for synset in synsets}
    except (MatFileError, TypeError, ValueError) as error:
        raise UserError(f"Cannot read {_META} that belongs to {name}: {error}.") from error
    if not ids or not all(_WNID.fullmatch(wnid) for wnid in ids.values()):
        raise UserError(f"{_META} that belongs to {name} holds no table of WordNet ids.")
    return ids


def _load(path: Path) -> tuple[str, bytes | None, str]:
    """(text of the ground truth, meta.mat if there is one, name for messages)."""
    try:
        if path.is_dir():
            found = [p for p in (path / _TRUTH, path / "data" / _TRUTH) if p.is_file()]
            if not found:
                raise UserError(f"The folder {path} holds no {_TRUTH}. {ACCEPTED}.")
            path = found[0]
        if not path.exists():
            raise UserError(f"There is no ground-truth file {path}. {ACCEPTED}.")
        if path.name.endswith((".tar", ".tar.gz", ".tgz")):
            return _from_tar(path)
        meta = path.with_name(_META)
        text = path.read_text(encoding="utf-8")
        return text, meta.read_bytes() if meta.is_file() else None, str(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text. {ACCEPTED}.") from error
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


def _from_tar(path: Path) -> tuple[str, bytes | None, str]:
    files: dict[str, bytes] = {}
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in (_TRUTH, _META) and member.isreg() and member.size <= _MOST_BYTES:
                content = tar.extractfile(member)
                assert content is not None
                files[name] = content.read()
    if _TRUTH not in files:
        raise UserError(f"{path} holds no {_TRUTH}. {ACCEPTED}.")
    return files[_TRUTH].decode("ascii"), files.get(_META), f"{_TRUTH} in {path}"
